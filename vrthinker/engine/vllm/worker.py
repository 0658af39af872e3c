"""What vLLM's workers have to do for us: vLLM mixes this class into them (`--worker-extension-cls`)."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """A method that is called by its name, in whichever process the model is."""

    model_runner: Any

    def refresh_tied_head(self) -> None:
        """Gives the output layer the embeddings' new weights, if the two are tied.

        On a CPU the output layer keeps a packed copy of its weights. `reload_weights` loads the embeddings
        alone when they are tied, so that without this the old policy's output layer would go on (vLLM 0.32).
        """
        model = self.model_runner.get_model()
        language = getattr(model, "language_model", model)
        head, embeddings = language.lm_head, language.model.embed_tokens
        if head is not embeddings and head.weight is embeddings.weight:
            head.quant_method.process_weights_after_loading(head)
