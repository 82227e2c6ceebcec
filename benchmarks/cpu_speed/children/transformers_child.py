"""transformers in bfloat16 on a Hugging Face folder, with a greedy loop of its own. See child_loop."""

from typing import Any

import torch
import transformers
from child_loop import Cell, Clock, Figures, Measure, serve, token_ids


class Transformers:
    """One model."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model

    def measure(self, cell: Cell) -> Figures:
        """See child_loop."""
        rows = [
            token_ids(max(1, cell["prompt"]), self._model.config.vocab_size, cell["seed"] + i)
            for i in range(cell["streams"])
        ]
        clock = Clock()
        cache = transformers.DynamicCache(config=self._model.config)
        if cell["kind"] == "prefill":
            clock.mark()
        ids = self._step(torch.tensor(rows), cache)
        clock.mark()
        if cell["kind"] == "prefill":
            return clock.figures(cell["prompt"])
        for _ in range(cell["new"]):
            ids = self._step(ids, cache)
        clock.mark()
        return clock.figures(cell["streams"] * cell["new"])

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        logits = self._model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def load(options: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """options: model, threads."""
    torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    facts = {"version": f"{transformers.__version__}, torch {torch.__version__}", "kv": "bf16"}
    return Transformers(model).measure, facts


if __name__ == "__main__":
    serve(load)
