"""The one decoder, the families as data, strict loading and saving."""

from steeple.model.decoder import Decoder, Hidden
from steeple.model.families import FAMILIES, Family, family_of, model_config
from steeple.model.layers import Attend
from steeple.model.load import load_decoder
from steeple.model.save import save_decoder

__all__ = [
    "FAMILIES",
    "Attend",
    "Decoder",
    "Family",
    "Hidden",
    "family_of",
    "load_decoder",
    "model_config",
    "save_decoder",
]
