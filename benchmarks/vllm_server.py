"""vLLM as a peer of `benchmarks.sampling`: run by the Python of an environment that has it; not to be started by hand."""

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    settings = json.loads(sys.stdin.readline())
    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        enable_prefix_caching=True,
        max_model_len=2048,
        max_num_seqs=256,
        disable_log_stats=True,
    )

    def draw(prompts: list[list[int]], tokens: int) -> int:
        greedy = settings["temperature"] == 0
        params = SamplingParams(
            n=settings["samples"],
            temperature=settings["temperature"],
            top_k=-1 if greedy else 40,
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
        )
        out = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(sample.token_ids) for request in out for sample in request.outputs)

    draw(settings["prompts"][:2], 8)  # warm, the prefix cached
    print("ready now", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        drawn = draw(settings["prompts"], settings["tokens"])
        assert drawn == len(settings["prompts"]) * settings["samples"] * settings["tokens"]
        print(f"speed {drawn / (time.perf_counter() - began)}", flush=True)


if __name__ == "__main__":
    main()
