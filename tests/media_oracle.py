"""Conversations with images and sounds in transformers, with the adapters in PEFT: the definition of right.

Eager attention, and one sound at a time: transformers 5.23 runs its default attention of the vision tower causally when
no patch is masked, and adds the mask of a batch of sounds to the scores instead of masking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversations import Message
from peers import require
from phi4edge import Model
from phi4edge.audio_processor import load_audio
from phi4edge.bundle import Bundle
from phi4edge.expanded import expand
from phi4edge.image_processor import ImageNumbers, load_image, process_image
from phi4edge.media import Media
from phi4edge.prompt import media_parts
from tiny_media import MediaShape, lora_tensors, media_model
from tiny_models import Array

ADAPTERS = ("vision", "speech")
PATCH = 14


class MediaOracle:
    """A Phi4MultimodalForCausalLM in PEFT with the adapters "vision" and "speech"; float32.

    It gets our crops, which other tests compare with those of transformers, and the log-mels of transformers.
    """

    def __init__(self, adapted: Any) -> None:
        self._adapted = adapted.eval()
        self._base = adapted.get_base_model()
        config = self._base.config
        self._crop_size: int = config.vision_config.crop_size
        self._image_token: int = config.vision_config.image_token_id
        self._audio_token: int = config.audio_config.audio_token_id
        self._mels_of = require("transformers").Phi4MultimodalFeatureExtractor()

    @staticmethod
    def of_shape(shape: MediaShape) -> MediaOracle:
        """The random checkpoint of these sizes."""
        torch, peft = require("torch"), require("peft")
        torch.set_num_threads(2)
        linears = r"model\.layers\.\d+\.(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj"
        ranks = {"vision": shape.vision_rank, "speech": shape.speech_rank}
        configs = {
            name: peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears) for name, rank in ranks.items()
        }

        def wrap() -> Any:
            adapted = peft.get_peft_model(media_model(shape), configs["vision"], adapter_name="vision")
            adapted.add_adapter("speech", configs["speech"])
            for name in ADAPTERS:
                tensors = lora_tensors(shape, name)
                state = {f"base_model.model.{key}": torch.from_numpy(rows) for key, rows in tensors.items()}
                peft.set_peft_model_state_dict(adapted, state, adapter_name=name)
            return adapted

        return MediaOracle(_silently(wrap))

    @staticmethod
    def of_checkpoint(path: Path) -> MediaOracle:
        """A checkpoint in transformers' layout, with its adapters in folders beside it."""
        torch, peft, transformers = require("torch"), require("peft"), require("transformers")
        torch.set_num_threads(2)

        def wrap() -> Any:
            model = transformers.Phi4MultimodalForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            adapted = peft.PeftModel.from_pretrained(model, path / "vision-lora", adapter_name="vision")
            adapted.load_adapter(path / "speech-lora", adapter_name="speech")
            return adapted

        return MediaOracle(_silently(wrap))

    def logits(self, tokens: Sequence[int], messages: list[Message], adapter: str | None) -> Array:
        """Float32 [vocab] of the last position; tokens have one placeholder for each image or sound."""
        torch = require("torch")
        ids, inputs = self._inputs(tokens, messages)
        if adapter is not None:
            self._adapted.set_adapter(adapter)
        with torch.no_grad(), self._adapted.disable_adapter() if adapter is None else nullcontext():
            logits = self._adapted(input_ids=ids, logits_to_keep=1, **inputs).logits
        return np.asarray(logits[0, -1].numpy(), np.float32)

    def answer(
        self, tokens: Sequence[int], messages: list[Message], adapter: str | None, n_most: int
    ) -> tuple[list[int], int]:
        """The tokens of the greedy answer, its end included, and the number of tokens of the prompt."""
        torch = require("torch")
        ids, inputs = self._inputs(tokens, messages)
        if adapter is not None:
            self._adapted.set_adapter(adapter)
        with torch.no_grad(), self._adapted.disable_adapter() if adapter is None else nullcontext():
            written = self._adapted.generate(input_ids=ids, max_new_tokens=n_most, do_sample=False, **inputs)
        return written[0, ids.shape[1] :].tolist(), ids.shape[1]

    def embeddings(self, tokens: Sequence[int], messages: list[Message]) -> Array:
        """Float32 [n, hidden]: what the decoder gets, of text, images and sounds."""
        torch = require("torch")
        ids, inputs = self._inputs(tokens, messages)
        model = self._base.model
        with torch.no_grad():
            rows = model.embed_tokens(ids)
            if inputs:
                rows = model.embed_tokens_extend(ids, rows, **inputs)
        return np.asarray(rows[0].numpy(), np.float32)

    def _inputs(self, tokens: Sequence[int], messages: list[Message]) -> tuple[Any, dict[str, Any]]:
        """Ids with a placeholder for each row, and what else the model takes."""
        torch = require("torch")
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        size = self._crop_size
        numbers = ImageNumbers(size, PATCH, 36, (0.5,) * 3, (0.5,) * 3)
        crops = [process_image(load_image(part["image"]), numbers) for part in parts if part["type"] == "image"]
        sounds = [load_audio(part["audio"]) for part in parts if part["type"] == "audio"]
        inputs: dict[str, Any] = {}
        counts: dict[int, list[int]] = {self._image_token: [each.n_tokens for each in crops], self._audio_token: []}
        if crops:  # pictures with fewer crops than another are filled up
            n_crops = max(len(each.pixel_values) for each in crops)
            pixels = np.zeros((len(crops), n_crops, 3, size, size), np.float32)
            masks = np.ones((len(crops), n_crops, size // PATCH, size // PATCH), bool)
            for index, each in enumerate(crops):
                pixels[index, : len(each.pixel_values)] = each.pixel_values
                masks[index, : len(each.patch_mask)] = each.patch_mask
            inputs["image_pixel_values"] = torch.from_numpy(pixels)
            inputs["image_attention_mask"] = torch.from_numpy(masks)
            inputs["image_sizes"] = torch.tensor([[size * each.grid[1], size * each.grid[0]] for each in crops])
        if sounds:
            (samples,) = sounds
            found = self._mels_of([samples], sampling_rate=16000, return_tensors="pt")
            inputs["audio_input_features"] = found["audio_input_features"]
            inputs["audio_embed_sizes"] = found["audio_embed_sizes"]
            counts[self._audio_token] = found["audio_embed_sizes"].tolist()
        ids = [token for token in tokens for _ in range(counts[token].pop(0) if token in counts else 1)]
        return torch.tensor([ids]), inputs


def our_embeddings(bundle: Path, model: Model, messages: list[Message], table: Array, branch: Any) -> Array:
    """Float32 [n, hidden] of the bundle that a model was loaded from.

    table: the embedding of its vocabulary.  branch: the projector for sounds.
    """
    media = Media(Bundle.open(bundle), model.config.hidden_size, model.threads, model.tokenizer.special_tokens)
    kinds = {model.tokenizer.special_tokens[text]: kind for kind, text in media.placeholders.items()}
    items = [item for part in media_parts(messages) for item in media.read(part, branch)]
    pieces = expand(model.encode(messages), kinds, items).pieces
    return np.concatenate([table[piece] if isinstance(piece, list) else media.encode(piece) for piece in pieces])


def _silently(wrap: Callable[[], Any]) -> Any:
    """PEFT asks transformers for old names, which warns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *arguments, **options: None)
        return wrap()
