"""Sentence embeddings by a model that lies in its own package: text in, the features of a last layer out, nothing fetched.

    phi = mean_w E[w] / |mean_w E[w]|,     E the word vectors of WordLlama (256 numbers a token, MIT)

A second for 10,000 sentences. Larger models, which have to be fetched, make better features: any array (n, D) serves.
"""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["embed_texts"]


def embed_texts(texts: Sequence[str]) -> Float[np.ndarray, "texts features"]:
    """Features (n, 256) of sentences, float32, of length 1; 0 for a text without a word.

    Fits a scikit-learn pipeline: ``make_pipeline(FunctionTransformer(embed_texts), LastLayerClassifier())``.

    Args:
        texts: n strings.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: for something that is no string, named by its index.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {texts[:40]!r}; a sequence of strings is accepted")
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"texts has a {type(text).__name__} at index {index}; strings are accepted")
    model = _model()
    features = np.zeros((len(listed), model.embedding.shape[1]), np.float32)
    words = [index for index, text in enumerate(listed) if text.strip()]
    if words:
        found = np.asarray(model.embed([listed[index] for index in words]), np.float32)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        features[words] = np.divide(found, length, out=np.zeros_like(found), where=length > 0)
    return features


@cache
def _model() -> Any:
    log = logging.getLogger()
    level, handlers = log.level, log.handlers[:]
    try:
        import wordllama
    except ImportError as error:
        raise ImportError("embed_texts needs the package wordllama: pip install 'ssm_nn[text]'") from error
    finally:
        # its import makes the root logger print what every package reports
        log.setLevel(level)
        log.handlers[:] = handlers
    # its own folder as the cache: weights and tokeniser lie there, and nothing is looked for elsewhere
    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
