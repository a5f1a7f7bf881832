"""An architecture in a package of its own: all that it needs is its configuration, its models and this record."""

from hf_hybrid.auto import Architecture, register_architecture

register_architecture(
    Architecture(
        model_type="gated_average",
        title="gated moving average",
        summary="a moving average gated by the current token",
        decoding_state="one state of the moving average per layer: constant",
        package=__name__,
        config="configuration_gated_average:GatedAverageConfig",
        modeling="gated_average_heads",
        heads={
            "AutoModel": "GatedAverageModel",
            "AutoModelForCausalLM": "GatedAverageForCausalLM",
            "AutoModelForSequenceClassification": "GatedAverageForSequenceClassification",
            "AutoModelForTokenClassification": "GatedAverageForTokenClassification",
        },
        lora_targets=("in_proj", "out_proj"),
        state_modules=("ema",),
        undecayed=("embed_tokens",),
    )
)
