"""Tasks: one line each, read by what builds the model, what reads the data, the loss, and the words about them."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_hess.registry.table import Reference, Registry

_DATA = "hpc_hess.model.data"


@dataclass(frozen=True)
class TaskSpec:
    """What a model is for: which class of transformers it is, what a sample is, and what the loss is a mean over.

    Attributes
    ----------
    name : the value of model.task.
    words : what its models are called, after "a".
    meaning : what the loss is the mean of.
    auto : the class of transformers that builds the model.
    samples : samples(data section, model section, source) -> model.data.data.Samples. Collective: no.
    by_token : each token of the input has logits of its own, so exact products are taken block by block.
    next_token : a token's logits predict the token after it.
    predicts : what the loss is a mean over, in the singular.

    """

    name: str
    words: str
    meaning: str
    auto: str
    samples: Reference
    by_token: bool = False
    next_token: bool = False
    predicts: str = "token"

    @property
    def said(self) -> str:
        """The name, and what it means, for the list of the configuration's keys."""
        return f"`{self.name}` ({self.meaning})"


TASKS: Registry[TaskSpec] = Registry(
    TaskSpec(
        "causal-lm",
        "causal language model",
        "each token predicts the next one",
        "AutoModelForCausalLM",
        f"{_DATA}.data:next_tokens",
        by_token=True,
        next_token=True,
    ),
    TaskSpec(
        "masked-lm",
        "masked language model",
        "some tokens are masked, and predicted",
        "AutoModelForMaskedLM",
        f"{_DATA}.masking:masked_tokens",
        by_token=True,
    ),
    TaskSpec(
        "seq2seq-lm",
        "sequence-to-sequence model",
        "a text predicts the tokens of another",
        "AutoModelForSeq2SeqLM",
        f"{_DATA}.examples:text_to_text",
    ),
    TaskSpec(
        "sequence-classification",
        "classifier of texts",
        "a text, or a pair of texts, predicts its label",
        "AutoModelForSequenceClassification",
        f"{_DATA}.examples:labelled_texts",
        predicts="label",
    ),
    TaskSpec(
        "image-classification",
        "classifier of images",
        "an image predicts its label",
        "AutoModelForImageClassification",
        f"{_DATA}.images:labelled_images",
        predicts="label",
    ),
)
