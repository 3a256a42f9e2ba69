"""Worked exemplars for BIG-Bench Hard, three for each form of answer. All are our own; none is in the set or in its prompts.

What a newcomer would get wrong: the form matters more than the topic. The published grading compares texts, so a model that is
shown "Yes" where the set says "yes" is marked down for its capitals.
"""

from __future__ import annotations

from typing import NamedTuple


class Worked(NamedTuple):
    """A question with its way to the answer, in the form that the set gives answers in."""

    question: str
    thought: str
    answer: str


_YES_NO = "\nOptions:\n- Yes\n- No"
_VALIDITY = "\nIs the argument, given its premises, deductively valid or invalid?\nOptions:\n- valid\n- invalid"
_PLAUSIBLE = "Is the following sentence plausible?"

WORKED: dict[str, tuple[Worked, ...]] = {
    "choice": (
        Worked(
            "Four flags hang in a row. The green flag is left of the white flag. The red flag is right of the white flag. The "
            "blue flag is the leftmost. Which flag is the rightmost?\nOptions:\n(A) The blue flag\n(B) The green flag\n"
            "(C) The red flag\n(D) The white flag",
            "Blue comes first. Green comes before white, and white before red. So the order is blue, green, white, red. The "
            "last flag is the red one, which is option (C).",
            "(C)",
        ),
        Worked(
            "A parcel left on 27 February 2023 and took three days. On which date did it arrive, in DD/MM/YYYY?\nOptions:\n"
            "(A) 30/02/2023\n(B) 02/03/2023\n(C) 01/03/2023\n(D) 02/03/2024",
            "February 2023 has 28 days. One day after 27 February is 28 February, two days after is 1 March, three days after "
            "is 2 March 2023. That is 02/03/2023, option (B).",
            "(B)",
        ),
        Worked(
            'Whom does the word "she" mean?\nSentence: The cook thanked the farmer because she had brought fresh beans.\n'
            "Options:\n(A) The farmer\n(B) The cook\n(C) It cannot be told",
            "The cook gives thanks for something that was done for her. It was the beans that were brought, so the farmer "
            "brought them. That is option (A).",
            "(A)",
        ),
    ),
    "yes or no": (
        Worked(
            "You stand at a lamp post and face north. Walk 4 metres. Turn right. Walk 3 metres. Turn around. Walk 3 metres. "
            f"Are you back at the lamp post?{_YES_NO}",
            "Let the lamp post be (0, 0). Walking 4 metres north leads to (0, 4). Turned right, 3 metres east lead to (3, 4). "
            "Turned around, 3 metres west lead to (0, 4). That is not (0, 0).",
            "No",
        ),
        Worked(
            "Ruta always lies. Emil says that Ruta lies. Does Emil tell the truth?",
            "Ruta lies. Emil says just that, so what he says is true.",
            "Yes",
        ),
        Worked(
            "A valley is flooded as soon as one of the two gates of its dam is open. Today both were shut until Ivo opened the "
            f"left one, and the valley was flooded. Did Ivo cause the flood?{_YES_NO}",
            "One open gate is enough. Without Ivo no gate would have been open, and there would have been no flood. Most "
            "people would say that he caused it.",
            "Yes",
        ),
    ),
    "plausible": (
        Worked(
            f'{_PLAUSIBLE} "The goalkeeper served an ace."',
            "A goalkeeper plays football, handball or hockey. An ace is served in tennis or volleyball.",
            "no",
        ),
        Worked(
            f'{_PLAUSIBLE} "The swimmer touched the wall first."',
            "A swimmer races in a pool. Touching the wall ends a race in a pool.",
            "yes",
        ),
        Worked(
            f'{_PLAUSIBLE} "The pitcher dribbled past two defenders."',
            "A pitcher plays baseball. Dribbling past defenders belongs to football or basketball.",
            "no",
        ),
    ),
    "true or false": (
        Worked(
            "( False or not False ) and True and not ( True and True ) is",
            "( False or not False ) = False or True = True. not ( True and True ) = not True = False. True and True and False "
            "= False.",
            "False",
        ),
        Worked(
            "not ( False and ( True or False or False ) ) is",
            "True or False or False = True. False and True = False. not False = True.",
            "True",
        ),
        Worked(
            "False or False or False or ( not True or True ) is",
            "not True or True = False or True = True. False or False or False or True = True.",
            "True",
        ),
    ),
    "validity": (
        Worked(
            '"Every oak in the park is older than a century. The tree at the gate is an oak in the park. It follows that the '
            f'tree at the gate is older than a century."{_VALIDITY}',
            "The first premise speaks of every oak in the park, and the tree is one of them. So what holds for all of them "
            "holds for it.",
            "valid",
        ),
        Worked(
            f'"Whoever plays the cello can read music. Lone can read music. It follows that Lone plays the cello."{_VALIDITY}',
            "The premise leads from the cello to reading music, not back. Lone may have learnt to read music with another "
            "instrument.",
            "invalid",
        ),
        Worked(
            '"No ferry of the line carries lorries. Some ships in the harbour carry lorries. It follows that some ships in the '
            f'harbour are no ferries of the line."{_VALIDITY}',
            "Take a ship in the harbour that carries lorries. A ferry of the line carries none, so this ship is no ferry of "
            "the line.",
            "valid",
        ),
    ),
    "number": (
        Worked("(6 + -2 * 4) - (3 * -5 + 1) =", "6 + -2 * 4 = 6 - 8 = -2. 3 * -5 + 1 = -15 + 1 = -14. -2 - -14 = 12.", "12"),
        Worked(
            "On the table lie two spoons, a knife, three forks and a napkin. How many pieces of cutlery lie on it?",
            "Spoons, knives and forks are cutlery, a napkin is not. 2 + 1 + 3 = 6.",
            "6",
        ),
        Worked("((-7 + 3) * (2 - 5)) - 20 =", "-7 + 3 = -4. 2 - 5 = -3. -4 * -3 = 12. 12 - 20 = -8.", "-8"),
    ),
    "words": (
        Worked(
            "Sort the following words alphabetically: List: kettle anchor lantern",
            "The first letters are k, a and l. In the alphabet a comes before k, and k before l.",
            "anchor kettle lantern",
        ),
        Worked(
            "Sort the following words alphabetically: List: maple birch maize bench",
            'Two words begin with b: "bench" comes before "birch", since e comes before i. Two begin with m: "maize" comes '
            'before "maple", since the third letters are i and p. The words with b come first.',
            "bench birch maize maple",
        ),
        Worked(
            "Sort the following words alphabetically: List: violin drum viola",
            '"drum" comes first. "viola" and "violin" differ in the fifth letter, and a comes before i.',
            "drum viola violin",
        ),
    ),
    "brackets": (
        Worked(
            "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: ( [ ] { ( )",
            'Open, from left to right: "(", then "[" which is closed at once, "{", then "(" which is closed at once. Still '
            'open are "(" and "{". They are closed from the last to the first.',
            "} )",
        ),
        Worked(
            "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: < ( ( ) [ ] [ ]",
            'Open, from left to right: "<", "(", then three pairs that are closed at once. Still open are "<" and "(". They '
            "are closed from the last to the first.",
            ") >",
        ),
        Worked(
            "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: { { [ < > ] }",
            'Open, from left to right: "{", "{", "[", then "<" which is closed at once. The "]" closes "[", and the "}" closes '
            'the second "{". Still open is the first "{".',
            "}",
        ),
    ),
}
"""By the form of the answer."""
