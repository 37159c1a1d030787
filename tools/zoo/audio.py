"""Speech and audio models."""

from __future__ import annotations

from typing import Any

from .model import BATCH_SIZES, VOCAB, Field, Sizes, ZooModel, entry, pretrained

WAVE = Field("input_values", ("B", "L"))
WAVE_SIZES = ({"B": 2, "L": 400}, {"B": 1, "L": 333}, {"B": 3, "L": 640})

SPEECH: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
}


def speech(
    name: str,
    prefix: str,
    layers: int,
    note: str = "",
    head: str = "Model",
    sizes: tuple[Sizes, Sizes, Sizes] = WAVE_SIZES,
    **settings: Any,
) -> ZooModel:
    """A transformer over a convolutional feature extractor, which gives one frame for 10 samples, less one."""
    construct = pretrained(prefix + head, f"{prefix}Config", SPEECH | {"num_hidden_layers": layers} | settings)
    return entry(name, "audio", construct, (WAVE,), sizes, (layers,), note=note)


WHISPER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MELS = Field("input_features", ("B", 8, 40))
TARGET = Field("decoder_input_ids", ("B", "T"), "ids")
TARGET_SIZES: tuple[Sizes, Sizes, Sizes] = ({"B": 2, "T": 9}, {"B": 1, "T": 5}, {"B": 3, "T": 14})
FIXED_MELS = "the spectrogram length is fixed: the encoder refuses any other, and adds positions for that one"

AUDIO: tuple[ZooModel, ...] = (
    speech("wav2vec2", "Wav2Vec2", 3, head="ForCTC"),
    speech("hubert", "Hubert", 2),
    speech(
        "wavlm",
        "WavLM",
        2,
        num_buckets=16,
        sizes=({"B": 2, "L": 400}, {"B": 3, "L": 333}, {"B": 4, "L": 640}),
        note="traced at a batch of 2, torch.export guards that the batch is not 1",
    ),
    speech(
        "wav2vec2_conformer", "Wav2Vec2Conformer", 2, position_embeddings_type="relative", conv_depthwise_kernel_size=3
    ),
    speech(
        "sew",
        "SEW",
        2,
        squeeze_factor=2,
        sizes=({"B": 2, "L": 400}, {"B": 1, "L": 323}, {"B": 3, "L": 640}),
        note="frames are pooled in pairs and an odd one is padded back: torch.export guards that their number is odd",
    ),
    speech("data2vec_audio", "Data2VecAudio", 3, conv_pos_kernel_size=3),
    entry(
        "whisper",
        "encoder-decoder",
        pretrained("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
        (MELS, TARGET),
        TARGET_SIZES,
        (2, 3),
        note=FIXED_MELS,
    ),
    entry(
        "whisper_encoder",
        "audio",
        pretrained("WhisperForAudioClassification", "WhisperConfig", WHISPER | {"num_labels": 6}),
        (MELS,),
        BATCH_SIZES,
        (2,),
        note=FIXED_MELS,
    ),
    entry(
        "ast",
        "audio",
        pretrained(
            "ASTForAudioClassification",
            "ASTConfig",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "patch_size": 8,
                "max_length": 32,
                "num_mel_bins": 16,
                "frequency_stride": 6,
                "time_stride": 6,
            },
        ),
        (Field("input_values", ("B", 32, 16)),),
        BATCH_SIZES,
        (3,),
        note="the spectrogram is fixed: a position embedding of that size is added",
    ),
)
