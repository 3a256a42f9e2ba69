"""From logits to a token: temperature, top-k, top-p, min-p, then the inverse of the cumulative distribution at a given number.

No generator state: the caller brings one uniform number per row, so a row's token depends on its own logits and number alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from restem.sampling import Decoding

_ROWS = 8  # rows per chunk of the full-vocabulary softmax on a CPU: stays in the processor's cache
_BYTES = 1 << 29  # of a copy of the logits elsewhere: few launches, and little memory beside the logits
_CANDIDATES = 1024
_COLUMNS = 384  # the vocabulary is searched as this many interleaved parts


class Drawn(NamedTuple):
    """One token per row, and its log-probability under the untruncated model at temperature 1."""

    token_R: Tensor
    logprob_R: Tensor
    beyond_R: Tensor | None
    """Rows whose nucleus is larger than the candidates, so that the token does not count; None = there can be none."""


def choose(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Pick one token per row; return (token ids, their log-probabilities under the untruncated model at temperature 1).

    `uniform_R` holds numbers in [0, 1) as float64. Ties in the logits go to whichever candidate comes first.
    """
    token_R, logprob_R, beyond_R = draw(logits_RV, uniform_R, decoding)
    if beyond_R is not None and (beyond := beyond_R.nonzero()[:, 0].tolist()):
        for row in beyond:
            part = slice(row, row + 1)
            token_R[part], logprob_R[part] = draw_from_all(logits_RV[part], uniform_R[part], decoding)
    return token_R, logprob_R


def draw(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> Drawn:
    """The same without ever waiting for the device. Where top-p or min-p reach beyond the candidates, it says so."""
    size = len(logits_RV) if logits_RV.device.type == "cpu" else max(1, _BYTES // (8 * logits_RV.shape[-1]))
    if size >= len(logits_RV):
        return _draw(logits_RV, uniform_R, decoding)
    parts = [_draw(*pair, decoding) for pair in zip(logits_RV.split(size), uniform_R.split(size), strict=True)]
    token_R, logprob_R = torch.cat([part.token_R for part in parts]), torch.cat([part.logprob_R for part in parts])
    beyond = [part.beyond_R for part in parts if part.beyond_R is not None]
    return Drawn(token_R, logprob_R, torch.cat(beyond) if beyond else None)


def _draw(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> Drawn:
    normaliser_R = log_normaliser(logits_RV)
    beyond_R = None
    if decoding.temperature == 0:
        token_R = likeliest(logits_RV, 1)[1][:, 0]
    elif 0 < decoding.top_k < logits_RV.shape[-1]:
        value_RK, id_RK = likeliest(logits_RV, decoding.top_k)
        token_R = _pick(value_RK, id_RK, uniform_R, decoding, mass_R=None)
    elif decoding.top_p < 1 or decoding.min_p > 0:
        token_R, beyond_R = _draw_from_candidates(logits_RV, uniform_R, decoding)
    else:
        cumulative_RV = torch.softmax(logits_RV.float() / decoding.temperature, -1).double().cumsum_(-1)
        token_R = _invert(cumulative_RV, uniform_R)
    chosen_R = logits_RV.gather(-1, token_R[:, None])[:, 0].float()
    return Drawn(token_R, chosen_R - normaliser_R, beyond_R)


def log_normaliser(logits_RV: Tensor) -> Tensor:
    """log sum exp over the vocabulary, in float32, without a float32 copy of all logits."""
    if logits_RV.device.type != "cpu":
        return _log_normaliser_without_waiting(logits_RV)
    parts = [chunk[:, 0].float() - torch.log_softmax(chunk, -1, dtype=torch.float32)[:, 0] for chunk in logits_RV.split(_ROWS)]
    normaliser_R = torch.cat(parts)
    masked_R = logits_RV[:, 0] == float("-inf")  # some models mask tokens; the difference above needs a finite logit
    if masked_R.any():
        normaliser_R[masked_R] = torch.logsumexp(logits_RV[masked_R].float(), -1)
    return normaliser_R


def _log_normaliser_without_waiting(logits_RV: Tensor) -> Tensor:
    """Read off at each row's largest logit, which is finite."""
    parts = []
    for chunk in logits_RV.split(max(1, _BYTES // (4 * logits_RV.shape[-1]))):
        place_R1 = chunk.argmax(-1, keepdim=True)
        found = torch.log_softmax(chunk, -1, dtype=torch.float32).gather(-1, place_R1)
        parts.append((chunk.gather(-1, place_R1).float() - found)[:, 0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def likeliest(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row in falling order, and their token ids: `topk`, faster for a large vocabulary.

    Of interleaved parts of the vocabulary, the k with the largest maxima hold the k largest logits.
    """
    rows, size = logits_RV.shape
    height = size // _COLUMNS
    if k > _COLUMNS // 4 or height < 8:
        value_RK, id_RK = logits_RV.topk(k, -1)
        return value_RK, id_RK
    parts_RHC = logits_RV[:, : height * _COLUMNS].view(rows, height, _COLUMNS)
    part_RK = parts_RHC.amax(1).topk(k, -1).indices
    held_RHK = parts_RHC.gather(2, part_RK[:, None].expand(rows, height, k))
    ids_RHK = torch.arange(height, device=logits_RV.device)[:, None] * _COLUMNS + part_RK[:, None]
    rest_T = torch.arange(height * _COLUMNS, size, device=logits_RV.device)
    held_RX = torch.cat([held_RHK.flatten(1), logits_RV[:, height * _COLUMNS :]], 1)
    value_RK, place_RK = held_RX.topk(k, -1)
    return value_RK, torch.cat([ids_RHK.flatten(1), rest_T.expand(rows, -1)], 1).gather(1, place_RK)


def _draw_from_candidates(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor | None]:
    """Top-p and min-p over the whole vocabulary, and the rows for which the candidates are too few. Sorting all of it is slow,
    and the nucleus is nearly always small: sort the likeliest candidates."""
    scaled_RV = logits_RV.float() / decoding.temperature
    mass_R = torch.logsumexp(scaled_RV, -1)
    value_RK, id_RK = likeliest(scaled_RV, min(_CANDIDATES, scaled_RV.shape[-1]))
    token_R = _pick(value_RK, id_RK, uniform_R, decoding, mass_R=mass_R)
    if scaled_RV.shape[-1] <= _CANDIDATES:
        return token_R, None
    held_R = (value_RK - mass_R[:, None]).exp().sum(-1)
    beyond_R = held_R < decoding.top_p if decoding.top_p < 1 else torch.ones_like(held_R, dtype=torch.bool)
    if decoding.min_p > 0:  # a last candidate below the floor means that all above it are here
        beyond_R &= value_RK[:, -1] >= value_RK[:, 0] + math.log(decoding.min_p)
    return token_R, beyond_R


def draw_from_all(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities by top-p and min-p over rows that are sorted whole, a few at a time."""
    size = max(1, _BYTES // (16 * logits_RV.shape[-1]))
    if len(logits_RV) > size:
        pairs = zip(logits_RV.split(size), uniform_R.split(size), strict=True)
        token, logprob = zip(*(draw_from_all(*pair, decoding) for pair in pairs), strict=True)
        return torch.cat(token), torch.cat(logprob)
    scaled_RV = logits_RV.float() / decoding.temperature
    value_RV, id_RV = scaled_RV.sort(descending=True)
    token_R = _pick(value_RV, id_RV, uniform_R, decoding, mass_R=torch.logsumexp(scaled_RV, -1))
    return token_R, logits_RV.gather(-1, token_R[:, None])[:, 0].float() - log_normaliser(logits_RV)


def _pick(value_RK: Tensor, id_RK: Tensor, uniform_R: Tensor, decoding: Decoding, mass_R: Tensor | None) -> Tensor:
    """Truncate sorted candidates by top-p and min-p and draw. `mass_R`: log of the total over which top-p counts, where that
    is more than the candidates; the values are divided by the temperature already in that case."""
    scaled_RK = value_RK.float() / decoding.temperature if mass_R is None else value_RK
    total_R = torch.logsumexp(scaled_RK, -1) if mass_R is None else mass_R
    probability_RK = (scaled_RK - total_R[:, None]).exp()
    if decoding.top_p < 1:  # the smallest set that reaches top_p: drop what comes after it is reached
        before_RK = probability_RK.cumsum(-1) - probability_RK
        probability_RK = probability_RK.masked_fill(before_RK >= decoding.top_p, 0.0)
    if decoding.min_p > 0:
        probability_RK = probability_RK.masked_fill(probability_RK < decoding.min_p * probability_RK[:, :1], 0.0)
    column_R = _invert(probability_RK.double().cumsum(-1), uniform_R)
    return id_RK.gather(-1, column_R[:, None])[:, 0]


def _invert(cumulative_RK: Tensor, uniform_R: Tensor) -> Tensor:
    """The first column whose cumulative (unnormalised) probability exceeds the row's share u of the total."""
    target_R1 = (uniform_R * cumulative_RK[:, -1])[:, None]
    return torch.searchsorted(cumulative_RK, target_R1, right=True).clamp_(max=cumulative_RK.shape[-1] - 1)[:, 0]
