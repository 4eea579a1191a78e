"""Type mixes: which weight format each matrix of a model gets, by its role and layer, as llama.cpp gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """Types by role. `first` and `more` are given to early layers, or to the half that llama.cpp thinks matters."""

    rest: str
    head: str = "Q6_K"  # token_embd when it is the output matrix too, else output
    qkv: str = ""
    output: str = ""
    down: str = ""
    more: str = ""  # attn_qkv and ffn_down of the layers of use_more_bits()
    first: str = ""  # ffn_down, and attn_qkv where first_qkv, of the leading layers
    first_share: int = 8  # one in so many layers
    first_qkv: int = 0  # leading layers whose attn_qkv has the type `first`

    def type_of(self, role: str, layer: int, n_layers: int, *, tied: bool) -> str:
        """The type of a matrix; layer is -1 for the embedding and the output matrix."""
        if role == "output" or (role == "token_embd" and tied):
            return self.head
        if self.more and role in ("attn_qkv", "ffn_down") and use_more_bits(layer, n_layers):
            return self.more
        if self.first and role == "ffn_down" and layer < n_layers // self.first_share:
            return self.first
        if self.first and role == "attn_qkv" and layer < self.first_qkv:
            return self.first
        return {"attn_qkv": self.qkv, "attn_output": self.output, "ffn_down": self.down}.get(role, "") or self.rest


def use_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth, and every third layer between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


# As llama_model_quantize assigns them for phi3 with fewer than four query heads per key head.
MIXES = {
    "F32": Mix("F32", head="F32"),
    "F16": Mix("F16", head="F16"),
    "BF16": Mix("BF16", head="BF16"),
    "Q8_0": Mix("Q8_0", head="Q8_0"),
    "Q4_0": Mix("Q4_0"),
    "Q4_1": Mix("Q4_1"),
    "Q5_0": Mix("Q5_0"),
    "Q5_1": Mix("Q5_1"),
    "Q6_K": Mix("Q6_K"),
    "Q2_K": Mix("Q2_K", qkv="Q3_K", output="Q3_K", down="Q3_K"),
    "Q2_K_S": Mix("Q2_K", first="Q4_K"),
    "Q3_K_S": Mix("Q3_K"),
    "Q3_K_M": Mix("Q3_K", qkv="Q4_K", output="Q4_K", down="Q4_K", first="Q5_K", first_share=16, first_qkv=2),
    "Q3_K_L": Mix("Q3_K", qkv="Q5_K", output="Q5_K", down="Q5_K"),
    "Q4_K_S": Mix("Q4_K", first="Q5_K", first_qkv=4),
    "Q4_K_M": Mix("Q4_K", more="Q6_K"),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", more="Q6_K"),
    "IQ4_NL": Mix("IQ4_NL", first="Q5_K"),
    "IQ4_XS": Mix("IQ4_XS", first="Q5_K"),
}
# What `convert --quant` offers.
CONVERTIBLE: tuple[str, ...] = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
)
CONVERTIBLE += ("Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S")
# For `--head`: the matrix that turns the last state into logits.
HEAD_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")
# For adapter files.  llama.cpp reads the first three; the ranks of Phi-4-multimodal divide by 32, and 320 not by 256.
ADAPTER_TYPES = ("F32", "F16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL")
PRECISIONS = ("fp32", "fp16", "int8")  # of encoders
BITS = {8: "Q8_0", 4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}

# Formats of other block sizes for rows that do not divide by 256, and by 32.
_SHORTER_BLOCKS = {"Q6_K": "Q8_0", "Q5_K": "Q8_0"}
_SHORTER_BLOCKS |= dict.fromkeys(("Q4_K", "Q3_K", "Q2_K", "IQ4_XS"), "IQ4_NL")


def fitting_type(type_name: str, n_columns: int) -> str:
    """The type itself, or the nearest one whose blocks divide a row of so many values."""
    if type_name in _SHORTER_BLOCKS and n_columns % 256:
        type_name = _SHORTER_BLOCKS[type_name]
    return type_name if type_name in ("F32", "F16", "BF16") or n_columns % 32 == 0 else "F16"
