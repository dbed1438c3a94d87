"""The registered model as MLflow runs it: a models-from-code file, stored as source beside the weights (no pickle)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from data_pipeline.rng import stable_id
from rddm_dist.evaluation.generate import make_generator
from rddm_dist.evaluation.restore import make_restorer
from rddm_dist.loading import load_model
from rddm_dist.model.folding import folded
from rddm_dist.model.inputs import check_mask


class _Sampling:
    """What the signature says (`registry.pyfunc_signature`) in, uint8 images out.

    Apart from PythonModel because MLflow asks for type hints in a direct subclass, and knows none for image arrays; the
    signature says what goes in and out.
    """

    def load_context(self, context: PythonModelContext) -> None:
        model = load_model(context.artifacts["weights"])
        # Folded here once; folding again for other parameters then copies nothing.
        self._model = replace(model, net=folded(model.net))

    def predict(self, context, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """params: steps, eta, seed; side, of generated squares, 0: that of training (defaults in the signature).

        model_input: (B, H, W, 3) uint8, for a model that sees masks {"images": these, "masks": (B, H, W) uint8}  ->
        the same shape, or the squares that a model with data.preprocess.resize works on. An image's noise follows from
        its pixels, so the result does not depend on what else is in the batch.
        Of a generating model: (B,) int64, numbers of images  ->  (B, H, W, 3) uint8.
        """
        params = dict(params or {})
        if self._model.config.diffusion.generate:
            side = params.pop("side", 0)
            generator = make_generator(self._model, size=(side, side) if side else None, **params)
            return generator.generate(np.asarray(model_input).tolist())
        masks = None
        if isinstance(model_input, dict):
            model_input, masks = model_input["images"], np.asarray(model_input["masks"])
        check_mask(self._model.config.model.condition, given=masks is not None)
        images = np.asarray(model_input)
        ids = [stable_id(hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()) for image in images]
        return make_restorer(self._model, **params).restore(images, ids, masks)


class RddmPyfunc(_Sampling, PythonModel):
    """The model that `models:/name@champion` stands for."""


set_model(RddmPyfunc())
