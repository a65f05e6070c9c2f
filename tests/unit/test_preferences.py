"""The preference data rebuilt to the byte and judged by rules; the losses and estimates of labkit.preferences by their properties."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from torch import nn

from labkit import preferences
from labkit.data import PREFERENCE_COLUMNS, check_preferences, load_preferences
from labkit.files import DATA
from labkit.models import load_tokenizer
from labkit.preference_data import GENERATED, as_messages, write_files
from labkit.preference_judge import CRITERIA, deeds, judge, story_of, truth_of, written
from labkit.storyworld import tellers

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows():
    return {split: list(part) for split, part in load_preferences().items()}


@pytest.fixture(scope="module")
def everything(rows):
    return [row for split in SPLITS for row in rows[split]]


# The files


def test_rebuilding_gives_the_committed_files(tmp_path):
    write_files(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / "preferences" / f"{split}.jsonl").read_bytes(), split


def test_rows_and_columns(rows):
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 749, "validation": 150, "test": 263}
    assert all(tuple(row) == PREFERENCE_COLUMNS for row in rows["train"])
    for split in SPLITS:
        made = Counter(row["criterion"] for row in rows[split] if row["source"] == "storyworld")
        assert made == dict.fromkeys(("kind", "coherent", "right"), GENERATED[split])
        assert {row["criterion"] for row in rows[split]} == set(CRITERIA)
    assert sum(row["source"] == "written" for split in SPLITS for row in rows[split]) == 280


def test_no_prompt_comes_twice_and_every_id_is_its_own(everything):
    assert len({row["prompt"] for row in everything}) == len({row["id"] for row in everything}) == len(everything)


def test_passages_are_in_one_split_only(rows):
    passages = {split: {row["prompt"].split("\n\n", 1)[1] for row in rows[split]} for split in SPLITS}
    assert sum(map(len, passages.values())) == len(set().union(*passages.values()))


def test_no_pair_is_in_two_splits(rows):
    pairs = {split: {row["chosen"] + "\n" + row["rejected"] for row in rows[split]} for split in SPLITS}
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["validation"] and not pairs["validation"] & pairs["test"]


def test_prompt_and_completion_are_short(everything):
    tokenizer = load_tokenizer("decoder")
    for row in everything:
        messages = as_messages(row)
        for side in ("chosen", "rejected"):
            assert len(tokenizer.apply_chat_template(messages["prompt"] + messages[side])["input_ids"]) <= 256, row["id"]


def test_length_tells_nothing(everything, rows):
    for part in (everything, rows["test"], *([row for row in everything if row["criterion"] == criterion] for criterion in CRITERIA)):
        words = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in part]
        longer = sum((a > b) + 0.5 * (a == b) for a, b in words) / len(words)
        assert 0.45 < longer < 0.55


def test_a_bag_of_words_is_little_better_than_chance(rows):
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = CountVectorizer(token_pattern=r"[\w']+|[?!.,\"]", min_df=2)
    vectors.fit([row[side] for row in rows["train"] for side in ("chosen", "rejected")])

    def differences(part):
        return (vectors.transform([row["chosen"] for row in part]) - vectors.transform([row["rejected"] for row in part])).toarray()

    train = differences(rows["train"])
    model = LogisticRegression(fit_intercept=False, max_iter=500)
    model.fit(np.vstack([train, -train]), np.r_[np.ones(len(train)), np.zeros(len(train))])
    margins = differences(rows["test"]) @ model.coef_[0]
    assert 0.45 < ((margins > 0) + 0.5 * (margins == 0)).mean() < 0.65


# The judge


def test_the_judge_agrees_with_the_generated_pairs(everything):
    for row in everything:
        if row["source"] == "storyworld":
            assert (judge(row, row["chosen"]), judge(row, row["rejected"])) == (1, 0), row["id"]


def test_the_judge_on_the_written_pairs(everything):
    """It knows the written answers; written endings say in their own words what its lexicon seldom holds, and the card says so."""
    for criterion, at_least in (("polite", 0.95), ("kind", 0.1), ("coherent", 0.03)):
        pairs = [
            (judge(row, row["chosen"]), judge(row, row["rejected"]))
            for row in everything
            if row["source"] == "written" and row["criterion"] == criterion
        ]
        right, wrong = (sum(sign * (a - b) > 0 for a, b in pairs) for sign in (1, -1))
        assert right / len(pairs) >= at_least and wrong <= 0.02 * len(pairs), criterion


ROOM = {"who": {"Mia": "in the park", "Tom": "in the park"}, "things": {"ball": "Tom"}, "places": ["in the park", "at the pond"]}
ASKED = {"answer": "in the park", "options": ["in the park", "at the pond"]}
JUDGED = [
    ("right", ASKED, "Mia is in the park.", 1),
    ("right", ASKED, "In the park, I believe.", 1),
    ("right", ASKED, "Mia is at the pond.", 0),
    ("right", ASKED, "First in the park, and now at the pond.", 0),
    ("right", ASKED, "She is somewhere.", 0),
    ("right", ASKED, "", 0),
    ("polite", ASKED, "Who cares? In the park.", 0),
    ("kind", ROOM, "Tom hugged Mia.", 1),
    ("kind", ROOM, "Tom laughed at Mia. Then he was sorry.", 1),
    ("kind", ROOM, "Tom was sorry. Then he laughed at Mia.", 0),
    ("kind", ROOM, "Nina hugged Mia.", 0),
    ("kind", ROOM, "A girl called Nina hugged Mia.", 1),
    ("kind", ROOM, "The sky was blue.", 0),
    ("coherent", ROOM, "Tom had the ball.", 1),
    ("coherent", ROOM, "Mia had the ball.", 0),
    ("coherent", ROOM, "Mia was at the pond.", 0),
    ("coherent", ROOM, "Nina played with Mia.", 0),
    ("coherent", ROOM, "The sky was blue.", 0),
]


@pytest.mark.parametrize(("criterion", "truth", "completion", "expected"), JUDGED)
def test_the_judge_by_example(criterion, truth, completion, expected):
    assert judge({"criterion": criterion, "truth": json.dumps(truth)}, completion) == expected


def test_the_judge_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="criterion is 'funny': choose one of kind, coherent"):
        judge({"criterion": "funny", "truth": "{}"}, "Ha.")


def test_deeds_in_their_order():
    assert deeds('He hugged her. "Go away, silly," she said.') == [True, False]
    assert deeds("The wind blew.") == []


def test_truth_of_a_story_and_back():
    story = next(iter(tellers(7, "train"))).story(episodes=1, max_steps=6)
    truth = truth_of(story)
    assert set(truth["who"]) == {who.name for who in story.characters}
    told = {name: at if at in truth["places"] else "" for name, at in truth["who"].items()}
    assert truth_of(story_of(truth)) == truth | {"who": told}


def test_written_pairs_are_two_texts_each():
    pairs = [pair for situations in written("pairs").values() for some in situations.values() for pair in some]
    assert len(pairs) == 280 and all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs)


# The loader


GOOD = dict.fromkeys(PREFERENCE_COLUMNS, "x") | {"rejected": "y"}
BAD = {
    "not json": ("{id: 1}", "not JSON"),
    "a column too few": (json.dumps({"id": "y"}), r"has \['id'\]; give it exactly id, criterion"),
    "no prompt": (json.dumps(GOOD | {"id": "y", "prompt": " "}), "prompt is ' '; give the row a text"),
    "both sides the same": (json.dumps(GOOD | {"id": "y", "rejected": "x"}), "chosen and rejected are both 'x'; remove the pair"),
    "the same id": (json.dumps(GOOD), "id 'x' is that of line 1 too"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_rejected_by_file_and_line(tmp_path, case):
    line, message = BAD[case]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: .*" + message):
        check_preferences(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is not there"):
        check_preferences(tmp_path / "test.jsonl")


def test_messages_are_the_shape_trl_takes():
    row = {"prompt": "Where is Mia?", "chosen": "In the park.", "rejected": "No idea."}
    assert as_messages(row) == {
        "prompt": [{"role": "user", "content": "Where is Mia?"}],
        "chosen": [{"role": "assistant", "content": "In the park."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }


def test_both_profiles_load_the_same_files():
    from labkit.catalog import CATALOG

    assert CATALOG["preferences"]["hub"] == CATALOG["preferences"]["offline"], "the judge needs the truth that these files hold"


# Losses and estimates


def test_bradley_terry_is_the_likelihood_of_the_preference():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = -(math.log(1 / (1 + math.exp(-1.5))) + math.log(1 / (1 + math.exp(2)))) / 2
    assert preferences.bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    assert preferences.preference_accuracy(chosen, rejected) == 0.5
    assert preferences.preference_accuracy(torch.zeros(3), torch.zeros(3)) == 0.5
    with pytest.raises(ValueError, match=r"shapes differ: chosen \(2,\), rejected \(3,\)"):
        preferences.bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="empty"):
        preferences.bradley_terry_loss(torch.zeros(0), torch.zeros(0))


def test_completion_mask_with_padding_on_either_side():
    right = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert preferences.completion_mask(torch.tensor([2, 1]), right).tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert preferences.completion_mask(torch.tensor([2, 1]), right.flip(1)).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="row 1 has 3 tokens, all of them prompt"):
        preferences.completion_mask(torch.tensor([2, 3]), right)


def test_sequence_logps_are_the_logarithm_of_a_product():
    logits, ids, mask = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    product = [math.prod(logits[r].softmax(-1)[t - 1, ids[r, t]].item() for t in range(1, 5) if mask[r, t]) for r in range(2)]
    assert preferences.sequence_logps(logits, ids, mask).exp().tolist() == pytest.approx(product, rel=1e-4)
    assert preferences.token_logps(logits.bfloat16(), ids).dtype == torch.float32


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[0, 0, 0]], "row 0 has no token of completion"), ([[1, 1, 0]], "begins at token 0"), ([[0, 1]], "does not fit input_ids")],
)
def test_sequence_logps_refuse(mask, message):
    with pytest.raises(ValueError, match=message):
        preferences.sequence_logps(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), torch.tensor(mask))


def test_token_logps_refuse_logits_of_other_ids():
    with pytest.raises(ValueError, match="do not fit input_ids"):
        preferences.token_logps(torch.randn(1, 4, 5), torch.zeros(1, 3, dtype=torch.long))


def test_dpo_is_bradley_terry_on_implicit_rewards():
    sides = [torch.randn(6) for _ in range(4)]
    result = preferences.dpo_loss(*sides, beta=0.3)
    chosen, rejected = 0.3 * (sides[0] - sides[2]), 0.3 * (sides[1] - sides[3])
    assert torch.allclose(result.loss, preferences.bradley_terry_loss(chosen, rejected))
    assert torch.allclose(result.margins, chosen - rejected) and result.accuracy == pytest.approx((chosen > rejected).float().mean().item())
    assert preferences.dpo_loss(sides[0], sides[1], sides[0], sides[1]).loss.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="beta is 0"):
        preferences.dpo_loss(*sides, beta=0)
    with pytest.raises(ValueError, match="carry a gradient"):
        preferences.dpo_loss(sides[0], sides[1], sides[2].requires_grad_(), sides[3])


def test_the_gradient_of_dpo_weighs_what_is_still_wrong():
    policy = [torch.tensor([0.0, 4.0]).requires_grad_(), torch.zeros(2).requires_grad_()]
    preferences.dpo_loss(*policy, torch.zeros(2), torch.zeros(2), beta=1.0).loss.backward()
    assert policy[0].grad[0] < policy[0].grad[1] < 0 < policy[1].grad[1] < policy[1].grad[0]


def test_a_frozen_copy_stays_where_it_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    reference = preferences.frozen_copy(model)
    before = reference(torch.ones(1, 3))
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(reference(torch.ones(1, 3)), before)
    assert not any(p.requires_grad for p in reference.parameters()) and all(p.requires_grad for p in model.parameters()) and model.training


def test_rloo_leaves_the_sample_out():
    assert preferences.rloo_advantages(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3.0, -1.5, 4.5]]
    with pytest.raises(ValueError, match="two samples or more"):
        preferences.rloo_advantages(torch.zeros(4, 1))


def test_rloo_with_policy_gradient_is_unbiased():
    """On a choice of three, averaged over everything two samples can be, it is the gradient of minus the expected reward."""
    logits, reward = torch.tensor([0.2, -0.5, 1.0], requires_grad=True), torch.tensor([1.0, 3.0, -2.0])
    (exact,) = torch.autograd.grad(-(logits.softmax(0) * reward).sum(), logits)
    found = torch.zeros(3)
    for a in range(3):
        for b in range(3):
            drawn = torch.tensor([a, b])
            logps = logits.log_softmax(0)[drawn]
            advantages = preferences.rloo_advantages(reward[drawn][None])[0]
            loss = preferences.policy_gradient_loss(logps[:, None], advantages, torch.ones(2, 1))
            found += logps.sum().exp().detach() * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(found, exact, atol=1e-6)


def test_kl_estimates_are_right_on_average():
    policy_logits, reference_logits = (
        torch.randn(6, generator=torch.Generator().manual_seed(0)),
        torch.randn(6, generator=torch.Generator().manual_seed(1)),
    )
    policy, reference = policy_logits.log_softmax(0), reference_logits.log_softmax(0)
    exact = preferences.exact_kl(policy_logits, reference_logits)
    for estimator in ("k1", "k3"):
        estimates = preferences.kl_per_token(policy[None], reference[None], torch.ones(1, 6), estimator)
        assert (policy.exp() * estimates[0]).sum().item() == pytest.approx(exact.item(), abs=1e-6)
        assert estimator == "k1" or bool((estimates >= 0).all())
    assert preferences.kl_per_token(policy[None], reference[None], torch.zeros(1, 6)).abs().sum() == 0
    assert exact > 0 and preferences.exact_kl(policy_logits, policy_logits).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="estimator is 'k9'"):
        preferences.kl_per_token(policy[None], reference[None], torch.ones(1, 6), "k9")


def test_the_penalty_takes_off_what_strays():
    policy, reference, mask = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-3.0, -2.0, -1.0]]), torch.tensor([[1, 1, 0]])
    assert preferences.penalised_rewards(torch.tensor([5.0]), policy, reference, mask, 0.5).tolist() == [3.5]
    with pytest.raises(ValueError, match="a negative penalty rewards drifting"):
        preferences.penalised_rewards(torch.tensor([5.0]), policy, reference, mask, -0.5)


def test_policy_gradient_refuses():
    policy, mask = torch.randn(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="do not fit 2 completions"):
        preferences.policy_gradient_loss(policy, torch.zeros(1, 2), mask)
    with pytest.raises(ValueError, match="the advantages carry a gradient"):
        preferences.policy_gradient_loss(policy, torch.zeros(2, requires_grad=True), mask)
    with pytest.raises(ValueError, match="shapes differ"):
        preferences.policy_gradient_loss(policy, torch.zeros(2), torch.ones(2, 4))


def test_it_imports_torch_and_nothing_of_labkit():
    text = (DATA.parent / "labkit" / "preferences.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) labkit", text, re.MULTILINE)
