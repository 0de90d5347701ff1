"""Score reviews for sentiment, where a text that is no review cannot score well.

In: rows with `prompt` (list of {role, content}), `completion` (str), `meta` (dict) and `finish_reason` (str). Out: one
score in [0, 1] per row; 0.5 is a well-formed neutral review. A score is made of two parts that can be read off the text:

    mood   mean over the sentences of s / (1 + |s|), s = positive minus negative words, negated ones reversed
    form   share of the words that stand in proper sentences: new, finished, neither a list of keywords nor the prompt
    score  form * (1 + mood) / 2

Invariant: a row's score depends on that row alone. Made to be optimised against: a word counts once per review and not
at all if the prompt has it, praise saturates within a sentence, and only more proper sentences of praise, in other
words, raise the score further.
"""

import re
from itertools import pairwise
from typing import Any


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


POSITIVE = _set(
    """
    admired adore adored amazed amazing appreciated beautiful best better brilliant charmed charming cheered cheerful
    clever comfortable cosy delicious delight delighted delightful elegant enchanting engaging enjoy enjoyable enjoyed
    excellent exciting feast fantastic fascinated fascinating favourite fine flawless flawlessly fresh friendly fun
    funny generous gift glad gladly good gorgeous graceful great gripped gripping happy heavenly helped helpful hooked
    impressed impressive incredible inspired inspiring joy joyful laugh laughed liked love loved lovely
    magnificent marvellous masterpiece memorable moved moving nice outstanding perfect perfectly pleasant pleased
    pleasure polished recommend refreshing relax relaxing reliable remarkable satisfied satisfying smile smiled smiling
    solid sparkled sparkling spectacular splendid spotless stunning superb tasty terrific thoughtful thrilled thrilling
    treasure treasured treat triumph warm welcome welcoming won wonderful wonderfully worth worthwhile
    """
)
NEGATIVE = _set(
    """
    annoyed annoying appalling avoid awful awkward bad badly bland bored boring broken broke careless cheap clumsy cold
    confused confusing cramped despised dirty disappointed disappointing disappointment disliked dismal dreadful dreary
    dull failed failure filthy flat forgettable frown frustrated frustrating grated greasy grim hate hated headache
    horrible horribly irritating lazy lifeless loathed mediocre mess messy miserable misery mistake nightmare noisy
    overpriced pain painful pathetic pointless poor poorly regret regretted resented rude ruined ruins sad shabby shoddy
    sloppy slow spoiled stale stupid tasteless tedious terrible terribly tired tiresome tiring ugly uncomfortable
    unfriendly unpleasant unreliable unwelcome useless waste wasted weak worse worst worthless
    """
)
NEGATIONS = _set(
    """
    not never no nothing nobody hardly barely without neither nor cannot
    """
)
FUNCTION_WORDS = _set(
    """
    a about after all also although am an and any are around as at be because been before behind between both but by can
    could did do does during each even ever every everyone for from had has have he her here his how i if in into is it
    its just may me more most my never no not of off on one only or our out over quite rather really she simply so some
    still such than that the their them then there they this those through to too truly two until up us very was we were
    what when where which while who will with would you your
    """
)

MIN_SENTENCES = 3
"""A shorter review has neutral sentences added: praise in one line is less than praise in three."""
MIN_WORDS, MAX_WORDS = 3, 30
"""Length of a proper sentence."""
MAX_KEYWORD_SHARE = 0.5
"""Above this share of sentiment words a sentence is a list of keywords."""
MIN_FUNCTION_SHARE = 0.2
"""Below this share of function words (the, was, and) likewise."""
MIN_DISTINCT_SHARE = 0.6
"""Below this share of distinct words a sentence repeats itself."""
MAX_SHARED = 0.5
"""Above this share of word pairs in common with the prompt, or with an earlier sentence, a sentence is a copy."""
OFF_TOPIC = 0.7
"""Factor for a review that has no content word in common with its prompt."""
NEGATION_REACH = 3
"""Words after a negation that it reverses, within its clause."""


def score(rows: list[dict[str, Any]]) -> list[float]:
    """Return a score in [0, 1] for each row's completion."""
    return [_score_row(row["prompt"], row["completion"], row["finish_reason"]) for row in rows]


def _score_row(prompt: list[dict[str, str]], completion: str, finish_reason: str) -> float:
    asked = _words(" ".join(message["content"] for message in prompt))
    sentences = re.findall(r"[^.!?]+[.!?]*", completion)
    proper: list[list[str]] = []
    num_words, mood, counted = 0, 0.0, set(asked)
    for position, sentence in enumerate(sentences):
        words = _words(sentence)
        num_words += len(words)
        cut = finish_reason == "length" and position == len(sentences) - 1
        if cut or not _is_proper(sentence, words) or any(_is_copy(words, other) for other in [asked, *proper]):
            continue
        proper.append(words)
        balance = _balance(sentence, counted)
        mood += balance / (1 + abs(balance))
    if not proper:
        return 0.0
    mood /= max(len(proper), MIN_SENTENCES)
    form = sum(map(len, proper)) / num_words
    topic = set(asked) - FUNCTION_WORDS
    if topic and topic.isdisjoint(word for words in proper for word in words):
        form *= OFF_TOPIC
    return form * (1 + mood) / 2


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


def _is_proper(sentence: str, words: list[str]) -> bool:
    """Whether a sentence begins and ends as one and reads as prose: neither too long, nor keywords, nor a loop."""
    if not (re.match(r"\s*[\"'(]?[A-Z0-9]", sentence) and sentence[-1] in ".!?"):
        return False
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    keywords = sum(word in POSITIVE or word in NEGATIVE for word in words)
    function_words = sum(word in FUNCTION_WORDS for word in words)
    return (
        keywords <= MAX_KEYWORD_SHARE * len(words)
        and function_words >= MIN_FUNCTION_SHARE * len(words)
        and len(set(words)) >= MIN_DISTINCT_SHARE * len(words)
    )


def _is_copy(words: list[str], other: list[str]) -> bool:
    pairs = set(pairwise(words))
    return len(pairs & set(pairwise(other))) > MAX_SHARED * len(pairs)


def _balance(sentence: str, counted: set[str]) -> int:
    """Return positive minus negative words of a sentence, leaving out those in `counted`, to which it adds the rest."""
    balance = 0
    for clause in re.split(r"[,;:]|\b(?:but|though|although|yet)\b", sentence.lower()):
        words = _words(clause)
        for position, word in enumerate(words):
            sign = (word in POSITIVE) - (word in NEGATIVE)
            if not sign or word in counted:
                continue
            counted.add(word)
            before = words[max(0, position - NEGATION_REACH) : position]
            negated = any(other in NEGATIONS or other.endswith("n't") for other in before)
            balance += -sign if negated else sign
    return balance
