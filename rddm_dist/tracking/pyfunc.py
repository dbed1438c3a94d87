"""The registered model as MLflow runs it: a models-from-code file, stored as source beside the weights (no pickle)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from data_pipeline.rng import stable_id
from rddm_dist.evaluation.restore import make_restorer
from rddm_dist.loading import load_model


class _Restoring:
    """uint8 images in, restored uint8 images out.

    Apart from PythonModel because MLflow asks for type hints in a direct subclass, and knows none for image arrays; the
    signature says what goes in and out.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self._model = load_model(context.artifacts["weights"])

    def predict(self, context, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """model_input: (B, H, W, 3) uint8; params: steps, eta, seed (defaults in the signature)  ->  the same shape,
        or the squares that a model with data.preprocess.resize works on.

        An image's noise follows from its pixels, so the result does not depend on what else is in the batch.
        """
        images = np.asarray(model_input)
        restorer = make_restorer(self._model, **(params or {}))
        ids = [stable_id(hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()) for image in images]
        return restorer.restore(images, ids)


class RddmPyfunc(_Restoring, PythonModel):
    """The model that `models:/name@champion` stands for."""


set_model(RddmPyfunc())
