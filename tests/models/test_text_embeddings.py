"""Sentence embeddings of a packaged model: near for like sentences, offline, and a pipeline with the last layer on them."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from ssm_nn.inference.last_layer.classifier import LastLayerClassifier
from ssm_nn.models.text_embeddings import embed_texts

pytest.importorskip("wordllama", reason="the extra text is not installed")


def test_like_sentences_are_near_and_empty_ones_zero():
    features = embed_texts(["my card has not arrived", "the card is late", "what is the exchange rate", "", " "])
    assert features.shape == (5, 256)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), [1, 1, 1, 0, 0], atol=1e-6)
    near = features @ features.T
    assert near[0, 1] > near[0, 2] + 0.3
    assert embed_texts([]).shape == (0, 256)


def test_sentences_do_not_depend_on_the_others():
    texts = [f"sentence {n} of some" for n in range(70)]
    np.testing.assert_array_equal(embed_texts(texts)[3], embed_texts(texts[3:4])[0])


@pytest.mark.parametrize(
    ("texts", "message"), [("one", "texts is the string 'one'"), (["one", 2], "texts has a int at index 1")]
)
def test_what_is_no_sequence_of_strings_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        embed_texts(texts)


def test_the_import_leaves_logging_alone():
    code = (
        "import logging; from ssm_nn.models.text_embeddings import embed_texts; embed_texts(['one']); "
        "log = logging.getLogger(); assert not log.handlers and log.level == logging.WARNING, (log.handlers, log.level)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pipeline_learns_intents_from_sentences(data_folder):
    with (data_folder / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["category"] in {"card_arrival", "exchange_rate", "lost_or_stolen_card"}
        ]
    texts, intents = [row["text"] for row in rows], [row["category"] for row in rows]
    pipeline = make_pipeline(FunctionTransformer(embed_texts), LastLayerClassifier())
    assert pipeline.fit(texts[::2], intents[::2]).score(texts[1::2], intents[1::2]) > 0.9
