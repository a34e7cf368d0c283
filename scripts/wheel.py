"""Build the wheel, install it into a fresh environment, and use it as a user would.

python scripts/wheel.py        # some minutes; needs a package index
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fresh_environment import ROOT, make, run

EXAMPLE = """
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

words = ["[PAD]", "[EOS]", *"abcdefghijklmnopqrstuvwxyz0123456789 ?"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")
model = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1)
)


def accuracy_reward(completions, **_):
    return [float("a" in completion) for completion in completions]


dataset = Dataset.from_dict({"prompt": [f"say a {i}?" for i in range(12)]})
args = GRPOConfig("out", per_device_train_batch_size=8, num_generations=4, max_completion_length=8, use_cpu=True,
                  bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
# The example of the README:
trainer = GRPOTrainer(
    model=model, reward_funcs=accuracy_reward, args=args, train_dataset=dataset, processing_class=tokenizer
)
config = LearnAlignConfig(warmup_samples=4)
trainer.add_callback(LearnAlignCallback(trainer, config))
trainer.train()
assert trainer.state.global_step == 8, trainer.state.global_step
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        constraints = ROOT / "constraints.txt"
        programs = make(folder / "env", "--constraint", str(constraints), f"{wheel}[report]")
        program = programs / "trl-learnalign"
        work = folder / "work"
        work.mkdir()
        assert "commands:" in run(program, "--help", cwd=work)
        assert "total" in run(program, "plan", "--pool_size", "7473", cwd=work)
        (work / "example.py").write_text(EXAMPLE)
        run(programs / "python", "example.py", cwd=work)
        assert "report.html" in run(program, "report", "out", cwd=work)
        assert (work / "out" / "report.html").stat().st_size > 50_000
        found = run(
            programs / "python",
            "-c",
            "import trl_learnalign; print(trl_learnalign.__file__)",
            cwd=work,
        )
        assert "site-packages" in found, found
        print(
            f"{wheel.name}: installed, trl-learnalign runs, the example trains, the report is made"
        )


if __name__ == "__main__":
    main()
