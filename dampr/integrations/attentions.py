"""Descriptions of the attention classes of Hugging Face's transformers, by which convert, Budget and compact find their
heads.

transformers itself is not imported.
"""

from __future__ import annotations

from dampr.prune.heads import KINDS, Kind

_SEPARATE = {"q_proj": 1, "k_proj": 1, "v_proj": 1}
_SHARED = Kind(_SEPARATE, "o_proj", sharing="num_key_value_groups")
_BERT = Kind(
    {"self.query": 1, "self.key": 1, "self.value": 1},
    "output.dense",
    core="self",
    head_dim="self.attention_head_size",
    scaled=("self.num_attention_heads", "self.all_head_size"),
)
_GPT2 = tuple(  # cross-attention, then self-attention; nn.Linear stands in place of Conv1D by then
    Kind(read, "c_proj", scaled=("num_heads", "split_size")) for read in ({"q_attn": 1, "c_attn": 2}, {"c_attn": 3})
)

KINDS |= {
    f"transformers.models.{module}": kinds
    for module, kinds in {
        "bert.modeling_bert.BertAttention": (_BERT,),
        "gpt2.modeling_gpt2.GPT2Attention": _GPT2,
        "llama.modeling_llama.LlamaAttention": (_SHARED,),
        "mistral.modeling_mistral.MistralAttention": (_SHARED,),
        "qwen2.modeling_qwen2.Qwen2Attention": (_SHARED,),
        "roberta.modeling_roberta.RobertaAttention": (_BERT,),
        "vit.modeling_vit.ViTAttention": (Kind(_SEPARATE, "o_proj", scaled=("num_attention_heads",)),),
    }.items()
}
