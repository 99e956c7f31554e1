from llmeff.attention.gated_delta import GatedDelta as GatedDelta
from llmeff.attention.mixer import Mixer as Mixer
from llmeff.attention.mixer import MixerConfig as MixerConfig
from llmeff.attention.softmax import Softmax as Softmax
