from llmeff.models.model import ModelConfig as ModelConfig
from llmeff.models.transformer import Decoder as Decoder
from llmeff.models.transformer import DecoderConfig as DecoderConfig
