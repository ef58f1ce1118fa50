"""The first of the random cases. And a planted fault is found, with the seed that repeats it."""

import re

import random_cases

import pseudo_labels


def test_two_hundred_random_cases(capsys):
    assert random_cases.main(["200"]) == 0, capsys.readouterr().out


def test_a_planted_fault_is_found_and_repeated_by_its_seed(capsys, monkeypatch):
    """Sinkhorn whose last step, to make each row sum to 1, is left out."""
    sound = pseudo_labels.sinkhorn

    def without_the_last_step(scores, temperature=0.05, iterations=3):
        q = sound(scores, temperature, iterations)
        return q / q.sum(0)

    kinds = (random_cases.labels, random_cases.patches)
    monkeypatch.setattr(random_cases, "KINDS", kinds)
    monkeypatch.setattr(pseudo_labels, "sinkhorn", without_the_last_step)
    assert random_cases.main(["9"]) == 1
    said = capsys.readouterr().out
    seed = re.search("^labels, seed .*random_cases.py 1 --first ([0-9]+)$", said, re.M)[1]
    assert "patches, seed" not in said and "AssertionError" in said
    assert random_cases.main(["1", "--first", seed]) == 1
    monkeypatch.setattr(pseudo_labels, "sinkhorn", sound)
    assert random_cases.main(["1", "--first", seed]) == 0
