"""The network: sizes, first weights, adapters, and forward passes in batches that equal those of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from PIL import Image

from nano.tokens import Tokens
from peers import require
from phi4edge.image_processor import Crops, ImageNumbers, process_image

torch: Any = require("torch")
transformers: Any = require("transformers")
functional = torch.nn.functional

CROP, PATCH, WIDTH, RANK, ALPHA = 112, 14, 256, 32, 64
_SIDE = CROP // PATCH  # patches
_ROTATED = 24  # pairs: 0.75 of a head of 64
IMAGE_NUMBERS: Final = ImageNumbers(CROP, PATCH, 36, (0.5,) * 3, (0.5,) * 3)
LORA_TARGETS: Final = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
IMAGE_PART, AUDIO_PART = "model.embed_tokens_extend.image_embed.", "model.embed_tokens_extend.audio_embed."
DECODER_PARTS: Final = ("model.embed_tokens.", "model.layers.", "model.norm.")
Tensor = Any
State = dict[str, Any]


def configuration(tokens: Tokens) -> Any:
    """Phi-4-multimodal's, with small numbers."""
    return transformers.Phi4MultimodalConfig(
        vocab_size=-(-len(tokens.tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        original_max_position_embeddings=1024,
        tie_word_embeddings=True,
        sliding_window=262144,
        partial_rotary_factor=0.75,
        rope_theta=10000.0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * _ROTATED,
            "long_factor": [round(1.0 + 11.0 * (i / (_ROTATED - 1)) ** 2, 4) for i in range(_ROTATED)],
        },
        bos_token_id=tokens.padding,
        pad_token_id=tokens.padding,
        eos_token_id=[tokens.padding, tokens.end],
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": CROP,
            "crop_size": CROP,
            "patch_size": PATCH,
            "image_token_id": tokens.image,
        },
        audio_config={
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_blocks": 4,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 128,
            "depthwise_separable_out_channel": 128,
            "nemo_conv_channels": 32,
            "bias_max_distance": 500,
            "audio_token_id": tokens.audio,
        },
    )


def new_network(tokens: Tokens, seed: int = 0) -> Any:
    """With weights of 1/sqrt(inputs): those of transformers are meant to be overwritten, and do not train.

    Eager attention, because transformers 5.23 runs its default one causally over the patches of a full crop.
    """
    torch.manual_seed(seed)
    network = transformers.Phi4MultimodalForCausalLM(configuration(tokens))
    network.set_attn_implementation("eager")
    to_residual = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "position_embedding" in name:
                weight.copy_(_grid_positions(*weight.shape))
            elif name.endswith(("embed_tokens.weight", "extensor", "probe")):
                weight.normal_(0, 0.05)
            elif "bias_values" in name or name.endswith("bias"):
                weight.zero_()
            elif weight.dim() > 1 and not name.endswith((".b1", ".b2")):
                scale = 0.5 if name.endswith(to_residual) else 1.0
                weight.normal_(0, scale * weight[0].numel() ** -0.5)
        for layer in network.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
            # Patches look at those like them, which are near ones, from the start.
            layer.self_attn.q_proj.weight.mul_(1.5)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return network


def _grid_positions(n: int, width: int) -> Tensor:
    """Sines and cosines of row and column, so that neighbours are alike."""
    side = int(n**0.5)
    waves = math.pi / side * 2 ** torch.linspace(0, 2, width // 4)
    angles = torch.arange(side).float()[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return 0.5 * torch.cat([rows, columns], -1).reshape(n, width)


# Weights by name, in which the wrappers that PEFT puts around adapted matrices do not show.


def base_state(network: Any, parts: tuple[str, ...]) -> State:
    """Without adapters: the weights whose names begin with one of the parts."""
    plain = {name.replace(".base_layer.", "."): value for name, value in network.state_dict().items()}
    return {name: value for name, value in plain.items() if ".lora_" not in name and name.startswith(parts)}


def adapter_state(network: Any, adapter: str) -> State:
    """PEFT's names without the adapter's."""
    found = {name: value for name, value in network.state_dict().items() if f".{adapter}.weight" in name}
    return {name.replace(f".{adapter}.weight", ".weight"): value for name, value in found.items()}


def load_base(network: Any, state: State, prefix: str = "") -> None:
    """Copies the weights whose names begin with the prefix."""
    own = network.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name.startswith(prefix):
                target = own.get(name)
                wrapped = re.sub(r"_proj\.weight$", "_proj.base_layer.weight", name)
                (own[wrapped] if target is None else target).copy_(value)


def add_adapter(network: Any, name: str, state: State | None = None) -> None:
    """A LoRA, which is the active one from now on."""
    peft = require("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS, bias="none")
    peft.inject_adapter_in_model(config, network, adapter_name=name)
    if state is not None:
        own = network.state_dict()
        with torch.no_grad():
            for key, value in state.items():
                own[key.replace(".weight", f".{name}.weight")].copy_(value)


def train_only(network: Any, parts: Iterable[str]) -> None:
    """All else is frozen, and so are the layers whose output nothing uses."""
    wanted = tuple(parts)
    unused = ("img_processor.head", "post_layernorm", "img_processor.encoder.layers.3.")
    for name, weight in network.named_parameters():
        weight.requires_grad_(any(part in name for part in wanted) and not any(part in name for part in unused))


def round_to_bfloat16(network: Any) -> None:
    """What the checkpoint will hold."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().float())


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """No gradients and no dropout inside."""
    network.eval()
    with torch.no_grad():
        yield
    network.train()


# Forward passes.


def collate(tokens: Tokens, examples: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Token numbers [n, length], padded on the right, and whether each is to be predicted.

    The length is a multiple of 8: kernels are compiled for each shape.
    """
    length = -(-max(len(each) for each, _ in examples) // 8) * 8
    ids = torch.full((len(examples), length), tokens.padding)
    wanted = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, (each, answers) in enumerate(examples):
        ids[row, : len(each)] = torch.tensor(each)
        wanted[row, : len(each)] = torch.tensor(answers)
    return ids, wanted


def answer_loss(
    network: Any,
    tokens: Tokens,
    examples: Sequence[tuple[list[int], list[bool]]],
    media: Sequence[tuple[int, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of the tokens of answers, and which rows are right in all of them.

    Right in all is what greedy decoding needs to be exact.  media: (placeholder, rows in the order of their places).
    """
    ids, wanted = collate(tokens, examples)
    embedded = network.model.embed_tokens(ids)
    for placeholder, rows in media:
        places = (ids == placeholder)[..., None]
        embedded = embedded.masked_scatter(places, rows.to(embedded.dtype).reshape(-1, WIDTH))
    hidden = network.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    targets, predicted = ids[:, 1:], wanted[:, 1:]
    logits = network.lm_head(hidden[predicted])
    loss = functional.cross_entropy(logits.float(), targets[predicted])
    wrong = torch.zeros(len(ids)).index_add_(
        0, predicted.nonzero()[:, 0], (logits.argmax(-1) != targets[predicted]).float()
    )
    return loss, wrong == 0


def crops_of(images: Sequence[Image.Image]) -> list[Crops]:
    return [process_image(image, IMAGE_NUMBERS) for image in images]


def patch_features(embed: Any, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of crops [n, 3, 112, 112], features [n, 64, 128] of the layer that is used; mask: bool [n, 8, 8]."""
    encoder, n = embed.img_processor, len(pixels)
    full = mask is None or bool(mask.all())
    mask = torch.ones(n, _SIDE, _SIDE, dtype=torch.bool) if mask is None else mask
    hidden = encoder.embeddings(pixel_values=pixels, patch_attention_mask=mask)
    # Added to the scores: transformers takes such a mask as it is.
    added = None if full else torch.zeros(n, 1, 1, _SIDE**2).masked_fill(~mask.view(n, 1, 1, -1), -1e9)
    for layer in encoder.encoder.layers[:-1]:
        hidden = layer(hidden, added)
    return hidden


def pooled(features: Tensor) -> Tensor:
    """2 x 2 patches become one token: [n, 4, 4, 128]."""
    grid = features.view(len(features), _SIDE, _SIDE, -1).permute(0, 3, 1, 2)
    return functional.avg_pool2d(grid, 2).permute(0, 2, 3, 1)


def image_rows(network: Any, images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> their rows of the prompt [n, rows, 256]."""
    embed = network.model.embed_tokens_extend.image_embed
    crops = crops_of(images)
    across, down = crops[0].grid
    n, half = len(images), _SIDE // 2
    if across == down == 1 and crops[0].patch_mask.all():  # the overview is the crop
        single = pooled(patch_features(embed, torch.from_numpy(np.stack([each.pixel_values[0] for each in crops]))))
        overview = details = single
    else:
        pixels = torch.from_numpy(np.concatenate([each.pixel_values for each in crops]))
        mask = torch.from_numpy(np.concatenate([each.patch_mask for each in crops]))
        maps = pooled(patch_features(embed, pixels, mask)).view(n, 1 + across * down, half, half, -1)
        overview = maps[:, 0]
        details = maps[:, 1:].view(n, down, across, half, half, -1).transpose(2, 3)
        details = details.reshape(n, down * half, across * half, -1)
        kept = torch.from_numpy(crops[0].patch_mask[1:, ::2, ::2]).view(down, across, half, half).transpose(1, 2)
        kept = kept.reshape(down * half, across * half)
        details = details[:, : int(kept[:, 0].sum()), : int(kept[0].sum())]
    line_end = embed.sub_img_feature_extensor.view(1, 1, 1, -1)
    between = embed.global_img_feature_extensor.view(1, 1, -1).expand(n, 1, -1)

    def lines(rows: Tensor) -> Tensor:
        return torch.cat([rows, line_end.expand(n, rows.shape[1], 1, -1)], 2).flatten(1, 2)

    together = torch.cat([lines(details), between, lines(overview)], 1)
    return project_image(embed, together)


def project_image(embed: Any, rows: Tensor) -> Tensor:
    return embed.img_projection_down(functional.gelu(embed.img_projection_up(rows)))


def audio_rows(network: Any, mels: Tensor, branch: str) -> Tensor:
    """Log-mels [n, frames, 80] -> rows of the prompt [n, frames / 8, 256], by the projector "speech" or "vision"."""
    embed = network.model.embed_tokens_extend.audio_embed
    return project_audio(embed, embed.encoder(mels, None), branch)


def project_audio(embed: Any, features: Tensor, branch: str) -> Tensor:
    up, down = (
        (embed.up_proj_for_speech, embed.down_proj_for_speech)
        if branch == "speech"
        else (embed.up_proj_for_vision_speech, embed.down_proj_for_vision_speech)
    )
    return down(functional.gelu(up(features)))


def with_fast_convolutions(network: Any) -> Any:
    """The same audio encoder with its convolutions as shifts and matrix products, of which a CPU is three times as
    fast to train."""
    encoder = network.model.embed_tokens_extend.audio_embed.encoder
    encoder.embed.forward = _subsampling(encoder.embed)
    for layer in encoder.encoders:
        layer.conv.forward = _convolution(layer.conv)
    return network


def _subsampling(embed: Any) -> Any:
    first, *others = (embed.conv[0], (embed.conv[2], embed.conv[3]), (embed.conv[5], embed.conv[6]))

    def windows(planes: Tensor) -> list[Tensor]:
        """[n, time, bands, channels] -> nine views with a stride of two."""
        n_frames, n_bands = (planes.shape[1] + 1) // 2, (planes.shape[2] + 1) // 2
        padded = functional.pad(planes, (0, 0, 1, 1, 1, 1))
        return [
            padded[:, i : i + 2 * n_frames - 1 : 2, j : j + 2 * n_bands - 1 : 2] for i in range(3) for j in range(3)
        ]

    def forward(mels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        nine = torch.cat(windows(mels[..., None]), -1)
        planes = functional.relu(functional.linear(nine, first.weight.view(first.weight.shape[0], 9), first.bias))
        for depthwise, pointwise in others:
            taps = depthwise.weight.view(-1, 9)
            planes = depthwise.bias + sum(view * taps[:, i] for i, view in enumerate(windows(planes)))
            planes = functional.relu(functional.linear(planes, pointwise.weight.flatten(1), pointwise.bias))
        return embed.out(planes.transpose(2, 3).flatten(2)), mask

    return forward


def _convolution(layer: Any) -> Any:
    glu, separable, kernel = layer.glu, layer.dw_sep_conv_1d, layer.kernel_size

    def forward(hidden: Tensor) -> Tensor:
        wide = functional.linear(layer.layer_norm(hidden), glu.ext_pw_conv_1d.weight[..., 0], glu.ext_pw_conv_1d.bias)
        value, gate = wide[..., : glu.output_dim] + glu.b1[..., 0], wide[..., glu.output_dim :] + glu.b2[..., 0]
        rows = value * glu.glu_act(gate)
        padded = functional.pad(rows, (0, 0, kernel - 1, 0))  # causal
        taps = separable.dw_conv.weight[:, 0]
        rows = separable.dw_conv.bias + sum(padded[:, i : i + rows.shape[1]] * taps[:, i] for i in range(kernel))
        rows = layer.act(functional.linear(rows, separable.pw_conv.weight[..., 0], separable.pw_conv.bias))
        return functional.linear(rows, layer.ext_pw_conv_1d.weight[..., 0], layer.ext_pw_conv_1d.bias)

    return forward
