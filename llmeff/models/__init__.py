from llmeff.models.hf import HFModelConfig as HFModelConfig
from llmeff.models.llama_format import read_config as read_config
from llmeff.models.model import LanguageModelConfig as LanguageModelConfig
from llmeff.models.model import ModelConfig as ModelConfig
from llmeff.models.model import save_model as save_model
from llmeff.models.transformer import Decoder as Decoder
from llmeff.models.transformer import DecoderConfig as DecoderConfig
