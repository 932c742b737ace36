"""A small GPT-2 under the Trainer of transformers, and resumed from its checkpoint.

python examples/hf_trainer.py
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lowbit_optim import Shampoo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--path", default="run/hf_trainer", help="of the checkpoints")
args = parser.parse_args()

# The documentation of Python, byte by byte.
text = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()))
windows = text[: len(text) // 64 * 64].view(-1, 64)
data = [{"input_ids": window, "labels": window} for window in windows]


def trainer() -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        args.path,
        max_steps=args.steps,
        save_steps=args.steps // 2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        logging_steps=args.steps,
        disable_tqdm=True,
        report_to=[],
    )
    # The rate is the optimizer's own: TrainingArguments.learning_rate is for the Trainer's.
    settings = {"lr": 3e-3, "bits": 4, "statistics_frequency": 5}
    model = GPT2LMHeadModel(config)
    return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(Shampoo, settings))


def weights(trained: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().cpu() for parameter in trained.model.parameters()]


whole = trainer()
whole.train()

# As in another process: a new model, a new optimizer, and what is in the folder.
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{args.path}/checkpoint-{args.steps // 2}")
same = all(map(torch.equal, weights(whole), weights(resumed)))
print("the resumed run is the same to the last bit" if same else "the resumed run differs")
