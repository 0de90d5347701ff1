import random
import statistics

import pytest

from dpo_ray.quickstart import reviews, sentiment

PROMPT = "Write a short review of the film The Silent Harbour."
PRAISE = "What a lovely film! The plot was clever and engaging. I adored the ending. I would recommend it to anyone."
MIXED = "I watched this film after work. The plot was clever, but the cast was weak. It may suit families."
BLAME = "What a dreadful film! The plot was dull and tedious. I hated the ending. I would not recommend it to anyone."

START_MEAN = 0.49
"""Mean score of the policy built from seed 0: 16 samples for each of 128 prompts, temperature 1, top_p 1, by vLLM."""

DEGENERATE = {
    "empty": "",
    "blank": " \n ",
    "punctuation": "!!! ... ?!",
    "one word": "Wonderful!",
    "one word repeated": "wonderful " * 30,
    "one word repeated as sentences": "Wonderful. " * 10,
    "keywords": "Wonderful superb delightful charming brilliant lovely excellent great pleasant beautiful.",
    "keywords in sentences": "Wonderful superb lovely. Great charming perfect. Brilliant clever treat.",
    "keywords with articles": "The superb and the lovely and the great and the brilliant and the clever and the fine.",
    "prompt copied": PROMPT,
    "prompt repeated": f"{PROMPT} {PROMPT} {PROMPT}",
    "sentence repeated": "I loved this film and its clever plot. " * 5,
    "sentence looped": "I loved the plot and I loved the plot and I loved the plot and I loved the plot.",
    "no sentence": "i loved this wonderful film and its clever plot",
    "no spaces": "Iloved.Thiswonderful.Filmandits.Cleverplot.",
    "shouted word list": "GREAT! SUPERB! WONDERFUL! PERFECT! AMAZING!",
}


def score_one(completion: str, prompt: str = PROMPT, finish_reason: str = "stop") -> float:
    row = {"prompt": [{"role": "user", "content": prompt}], "completion": completion, "meta": {}}
    return sentiment.score([{**row, "finish_reason": finish_reason}])[0]


def test_score_praise_above_mixed_above_blame():
    assert score_one(PRAISE) > 0.7 > score_one(MIXED) > 0.35 > score_one(BLAME) > 0


@pytest.mark.parametrize("completion", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_score_degenerate_completion_is_far_below_the_start(completion: str):
    assert score_one(completion) < 0.6 * START_MEAN


def test_score_grammar_reviews_spread_within_range():
    rng = random.Random(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": request.text}],
            "completion": reviews.write_review(request, rng),
            "meta": {},
            "finish_reason": "stop",
        }
        for request in reviews.requests(1000, seed=0)
    ]
    scores = sentiment.score(rows)
    assert 0 <= min(scores) <= max(scores) <= 1
    assert 0.4 < statistics.mean(scores) < 0.6
    assert statistics.stdev(scores) > 0.12


@pytest.mark.parametrize(("tone", "sign"), [("good", 1), ("plain", 0), ("bad", -1)])
def test_score_each_form_of_the_grammar_has_the_sign_of_its_tone(tone: str, sign: int):
    rng = random.Random(0)
    for request in reviews.requests(20, seed=0):
        for forms in (reviews.OPENINGS, reviews.MIDDLES, reviews.CLOSINGS):
            for form in forms[tone]:
                sentence = reviews._sentence(form, reviews._words(request, rng), rng)
                above = score_one(sentence, prompt="") - 0.5
                assert (above > 0) - (above < 0) == sign, sentence


@pytest.mark.parametrize(
    ("sentence", "opposite"),
    [
        ("The plot was good.", "The plot was not good."),
        ("The plot was never dull.", "The plot was dull."),
        ("I would recommend it.", "I would not recommend it."),
        ("The plot wasn't bad.", "The plot wasn't good."),
    ],
)
def test_score_negation_reverses_a_word(sentence: str, opposite: str):
    assert score_one(sentence, prompt="") > 0.5 > score_one(opposite, prompt="")


def test_score_negation_ends_with_its_clause():
    assert score_one("The plot was not long, but great.", prompt="") > 0.5


def test_score_praise_saturates_within_a_sentence_and_adds_up_over_sentences():
    once = score_one("The plot was clever.", prompt="")
    twice_in_one = score_one("The plot was clever and engaging.", prompt="")
    twice_in_two = score_one("The plot was clever. I adored the cast.", prompt="")
    assert 0.5 < once < twice_in_one < twice_in_two < 1


def test_score_repeated_word_counts_once():
    assert score_one("The plot was great. I found the cast great.", prompt="") == score_one("The plot was great.", "")


def test_score_word_of_the_prompt_counts_for_nothing():
    sentence = "The Wonderful Harbour is a film of two hours."
    assert score_one(sentence, prompt="How was the film The Wonderful Harbour?") == 0.5


def test_score_off_topic_review_loses():
    assert score_one(PRAISE, prompt="How was the hotel Blue Garden?") == pytest.approx(sentiment.OFF_TOPIC * score_one(PRAISE))


def test_score_completion_cut_by_length_loses():
    cut = PRAISE.removesuffix(" to anyone.")
    assert score_one(cut, finish_reason="length") < score_one(PRAISE)
    assert score_one(PRAISE, finish_reason="length") < score_one(PRAISE)


def test_score_rows_are_independent():
    rows = [{"prompt": [{"role": "user", "content": PROMPT}], "completion": text, "meta": {}, "finish_reason": "stop"}
            for text in (PRAISE, BLAME, PRAISE)]  # fmt: skip
    together = sentiment.score(rows)
    assert together == [sentiment.score([row])[0] for row in rows]
    assert together[0] == together[2]
