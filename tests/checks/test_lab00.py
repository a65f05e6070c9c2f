import pytest

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab00 as check


def right(predictions, labels):
    return sum(int(p == label) for p, label in zip(predictions, labels)) / len(labels)


WRONG = {
    "returns a tensor": (lambda p, y: (p == y).float().mean(), "return a Python number"),
    "counts": (lambda p, y: (p == y).sum().item(), "divide the number of right predictions"),
    "error rate": (lambda p, y: (p != y).float().mean().item(), "three of five predictions are right"),
    "a constant": (lambda p, y: 0.6, "every prediction is wrong"),
}


def test_takes_a_right_answer(capsys):
    check.accuracy(right)
    assert capsys.readouterr().out.count("✓") == 4


@pytest.mark.parametrize("wrong", WRONG)
def test_turns_down_a_wrong_answer_with_its_own_message(wrong):
    candidate, advice = WRONG[wrong]
    with pytest.raises(CheckFailed, match=advice):
        check.accuracy(candidate)


def test_stub():
    def stub(predictions, labels):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="accuracy: not written yet"):
        check.accuracy(stub)
