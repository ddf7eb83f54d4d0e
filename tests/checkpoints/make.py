"""Writes the sample checkpoints with the real frameworks, so that no test believes in a layout we made up.

Run by hand, in an environment of its own (README.md beside this file has the commands): the tests need only
what comes out of it, which is committed. Two runs of TRL's DPOTrainer on a tiny Llama with random weights:

* `dpo-lora`: a LoRA adapter; evaluates and saves at each step, keeps the last two checkpoints, loads the best
* `dpo-full-sharded`: the whole model, saved once, its weights in several shards with an index

Nothing is downloaded: the base model and its tokenizer are made here and laid out as a local hub cache.
"""

# Where the rest of the project is checked, none of the frameworks is installed.
# mypy: disable-error-code="import-not-found", disallow-subclassing-any=False

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

RUNS = ("dpo-lora", "dpo-full-sharded")
# A made-up name: it looks as the name of a hub model does, and the local cache resolves it.
BASE = "example-org/tiny-llama"
SEED = 42
# Small enough that a model of 150 kB comes out in several shards.
SHARD_SIZE = "60KB"
# What both runs are started with.
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 64,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "bf16": False,
    "use_cpu": True,
    "seed": SEED,
    "report_to": "none",
    "disable_tqdm": True,
}

PAIRS = [
    ("What does a checkpoint hold?", "The weights and the optimizer.", "Nothing at all."),
    ("Why save the optimizer?", "Training can go on from there.", "It looks nice."),
    ("When is a checkpoint finished?", "After its last file is written.", "As soon as its folder is there."),
    ("What is a shard?", "One part of a model's weights.", "A kind of fish."),
    ("What is an adapter?", "A few weights on top of a model.", "A plug for the wall."),
    ("What is a reward margin?", "The chosen reward less the rejected one.", "The edge of a page."),
    ("Where do checkpoints go?", "To a volume, then to an object store.", "Into the void."),
    ("Who reads a checkpoint?", "Whoever goes on training, or serves it.", "Nobody ever does."),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    """Parses the command line; trains in a temporary folder and moves what came out of it into place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        help="the folder in which the samples are replaced (default: the one this script lies in)",
    )
    parser.add_argument("--train-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_here:
        train_here()
        return
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # In the output folder and not in /tmp: moving into place is then a rename.
    with tempfile.TemporaryDirectory(prefix=".make-", dir=output) as name:
        work = Path(name)
        train_in(work)
        refuse_traces(work)
        for run in RUNS:
            replace(work / run, output / run)
    for run in RUNS:
        size = sum(path.stat().st_size for path in (output / run).rglob("*") if path.is_file())
        print(f"{run}: {size} bytes")


def train_in(work: Path) -> None:
    """Starts the training as a process of its own, whose environment is the same whoever runs this."""
    home = work / "home"
    home.mkdir()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        # Sets end up in files (target_modules, tags): without a fixed seed each run orders them anew.
        "PYTHONHASHSEED": "0",
        # The order in which floats are added, and so their last bits, depends on the number of threads.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The working folder is the runs' parent: output_dir can be relative, and no file learns where this ran.
    command = [sys.executable, str(Path(__file__).resolve()), "--train-here"]
    subprocess.run(command, cwd=work, env=environment, check=True)


def refuse_traces(work: Path) -> None:
    """Fails when a file that would be committed names this machine."""
    traces = {str(work), str(Path.home()), sys.prefix, sys.base_prefix, str(Path(__file__).parent.resolve())}
    host = socket.gethostname()
    if len(host) > 4:  # a shorter one turns up in weights by chance
        traces.add(host)
    for run in RUNS:
        for path in sorted((work / run).rglob("*")):
            # In the files of torch.save too: they are zips that hold their members uncompressed.
            content = path.read_bytes() if path.is_file() else b""
            for trace in sorted(traces - {"/"}):
                if trace.encode() in content:
                    sys.exit(f"{path.relative_to(work)} names this machine: {trace}")


def replace(source: Path, target: Path) -> None:
    """Puts a folder in the place of an older one, which goes when the temporary folder does."""
    if target.exists():
        target.rename(source.with_name(f"{source.name}.old"))
    source.rename(target)


# From here on the functions run in the process that train_in starts. They import the frameworks themselves:
# `--help` needs no torch then, and HF_HOME is read while huggingface_hub is being imported.


def train_here() -> None:
    """Makes the base model and does both runs, in the current folder."""
    make_base()
    train_lora()
    train_sharded()


def make_base() -> None:
    """Lays out a random model and its tokenizer as the hub's client caches a downloaded one."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    commit = hashlib.sha1(BASE.encode(), usedforsecurity=False).hexdigest()
    repository = Path(HF_HUB_CACHE) / f"models--{BASE.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    LlamaForCausalLM(config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer on the few sentences of this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in PAIRS for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def train_lora() -> None:
    """The run of a LoRA adapter: what most people who train with preferences do."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    DPOTrainer(
        model=BASE,
        args=DPOConfig(
            output_dir="dpo-lora",
            max_steps=3,
            eval_steps=1,
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            **ARGUMENTS,
        ),
        train_dataset=dataset(PAIRS),
        # What it trains on: after so few steps nothing else shows that the loss falls.
        eval_dataset=dataset(PAIRS),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ).train()


def train_sharded() -> None:
    """The run of a whole model, saved in shards, for which Trainer has no setting: its save is overridden."""
    import torch
    from transformers.trainer import TRAINING_ARGS_NAME
    from trl import DPOConfig, DPOTrainer

    class ShardingTrainer(DPOTrainer):
        # What Trainer._save does, in the same order, with a shard size.
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            target = Path(output_dir or self.args.output_dir)
            self.model.save_pretrained(target, state_dict=state_dict, max_shard_size=SHARD_SIZE)
            self.processing_class.save_pretrained(target)
            torch.save(self.args, target / TRAINING_ARGS_NAME)

    ShardingTrainer(
        model=BASE,
        args=DPOConfig(output_dir="dpo-full-sharded", max_steps=2, eval_steps=2, save_steps=2, **ARGUMENTS),
        train_dataset=dataset(PAIRS),
        eval_dataset=dataset(PAIRS),
    ).train()


def dataset(pairs: list[tuple[str, str, str]]) -> "Dataset":
    """Pairs of answers as TRL takes them: as conversations."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in pairs
        ]
    )


if __name__ == "__main__":
    main()
