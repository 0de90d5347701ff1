"""The configuration of a run: one frozen pydantic tree, shaped like the pipeline. Read run.py first.

YAML in, dotted overrides from the command line over it (`--train.beta 0.2`, see cli.py), resolved YAML out. Nothing is
read from the environment. What decides the result in silence has no default: policy, prompts or preferences, beta,
learning rate, and the reference when there is more than one round. An option that another one would leave without effect
is an error. Imports no torch, ray or vllm, so that `--help` answers at once.
"""

from dpo_ray.config.block import URI as URI
from dpo_ray.config.block import Block as Block
from dpo_ray.config.data import DATASETS as DATASETS
from dpo_ray.config.data import Conversations as Conversations
from dpo_ray.config.data import ExplicitPreferences as ExplicitPreferences
from dpo_ray.config.data import Preferences as Preferences
from dpo_ray.config.data import Prompts as Prompts
from dpo_ray.config.data import Source as Source
from dpo_ray.config.data import TranscriptPreferences as TranscriptPreferences
from dpo_ray.config.resources import ActorResources as ActorResources
from dpo_ray.config.resources import DataResources as DataResources
from dpo_ray.config.resources import EngineResources as EngineResources
from dpo_ray.config.resources import TrainResources as TrainResources
from dpo_ray.config.run import PreferenceRun as PreferenceRun
from dpo_ray.config.run import Round as Round
from dpo_ray.config.run import Run as Run
from dpo_ray.config.run import RunBlock as RunBlock
from dpo_ray.config.run import RunConfig as RunConfig
from dpo_ray.config.run import SftRun as SftRun
from dpo_ray.config.run import run_class as run_class
from dpo_ray.config.stages import Evaluate as Evaluate
from dpo_ray.config.stages import EvaluatePairs as EvaluatePairs
from dpo_ray.config.stages import EvaluateSft as EvaluateSft
from dpo_ray.config.stages import FunctionScore as FunctionScore
from dpo_ray.config.stages import Generate as Generate
from dpo_ray.config.stages import Pair as Pair
from dpo_ray.config.stages import Reference as Reference
from dpo_ray.config.stages import RewardModelScore as RewardModelScore
from dpo_ray.config.stages import Sampling as Sampling
from dpo_ray.config.stages import Score as Score
from dpo_ray.config.train import SftTrain as SftTrain
from dpo_ray.config.train import Train as Train
from dpo_ray.config.train import TrainBlock as TrainBlock
