"""Make the demo model: a small trained Llama, its NF4 checkpoint, and a QLoRA adapter trained on that checkpoint.

    python -m qmerge.demo.build OUT_DIR

Stages, in the order of `main`:

1. **Text.** Two small grammars in this file write all text, so nothing is downloaded and no text is somebody else's work.
   `EVERYDAY` writes short stories, sums, letters, diaries, lists and news of the harbour: the base learns these.
   `SHIP_LOG` writes log books of sailing ships, with other words, another form, and figures that depend on each other
   (force of the wind and state of the sea, speed and day's run, date, rising or falling glass): the adapter learns these.
2. **Tokenizer.** A byte-level BPE, trained on both kinds of text: real tokenizers have seen more than the base needs.
3. **Base.** A Llama with grouped-query attention, trained in float32 on `EVERYDAY`, quantized by transformers and
   bitsandbytes, saved by `save_pretrained`: `base-nf4/` is a stock NF4 checkpoint.
4. **Adapter.** peft's LoRA on all seven projections, trained on the NF4 base with `SHIP_LOG`: a short QLoRA run.
   rms(delta) is 1.5 % of rms(weight). This is large: short QLoRA runs on real models change 0.02 % to 1 %
   (docs/benchmarks.md). It is still far below half a step of NF4, so a merge that rounds to nearest loses it, and smaller
   deltas as well. The demo shows this.
5. **Numbers.** The loss on held-out log books of the base, of the base with the adapter, and of peft's own merge.

Everything is seeded. Text and tokenizer are the same everywhere. Weights are the same on the same kind of processor with
the same versions of the libraries; elsewhere sums differ in the last bits, and training drifts apart.
It needs torch, tokenizers, transformers, peft, accelerate and bitsandbytes, no GPU, and six minutes on two cores.
"""

from __future__ import annotations

import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BASE_NAME = "qmerge-demo-base"
VOCABULARY = 768
CONTEXT = 128  # tokens per training example
BATCH = 32
THREADS = 2  # fixed, because the order of float sums depends on it

BASE_CHARACTERS = 6_000_000
BASE_STEPS = 500
BASE_RATE = 3e-3
LORA_RANK = 8
LORA_ALPHA = 16  # a scale of 2, as in most recipes for QLoRA
ADAPTER_STEPS = 60  # few, so that the delta stays far below half a step of NF4
ADAPTER_RATE = 1e-4
TEXT_CHARACTERS = 90_000  # of calibration.txt, which is the adapter's training text, and of heldout.txt

Memory = dict[str, str]
Grammar = dict[str, list[str]]

# ---------------------------------------------------------------------------------------------------------------------
# The grammars. `<symbol>` becomes one of the symbol's lines; `<x:symbol>` does the same and remembers the outcome as
# <x>; `<Symbol>` and `<symbol^>` start with a capital letter. Earlier lines are more likely. Facts that need arithmetic
# come from the functions further down, by way of the memory.
# ---------------------------------------------------------------------------------------------------------------------

WORDS: Grammar = {
    "colour": ["red", "green", "blue", "white", "black", "yellow", "brown", "grey", "golden", "silver"],
    "size": ["small", "big", "old", "new", "heavy", "little", "round", "long", "broken", "empty", "strange", "pretty"],
    "number": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"],
    "fruit": ["apples", "pears", "plums", "cherries", "oranges", "lemons", "figs", "nuts"],
    "food": ["bread", "cheese", "soup", "honey", "butter", "milk", "rice", "fish", "salt", "cake", "tea"],
    "thing": [
        "box", "lamp", "key", "book", "hat", "cup", "clock", "letter", "coat", "basket", "mirror", "umbrella", "bell",
        "map", "knife", "candle", "blanket", "ring", "spoon", "drum", "kite", "bottle", "coin", "ladder", "rope",
    ],
    "animal": ["dog", "cat", "horse", "bird", "goat", "hen", "fox", "rabbit", "cow", "owl", "mouse", "duck"],
    "room": ["kitchen", "garden", "attic", "cellar", "hall", "bedroom", "workshop", "stable", "library"],
    "place": [
        "market", "river", "school", "bridge", "forest", "mill", "harbour", "station", "church", "hill", "bakery",
        "castle", "lake", "farm", "theatre",
    ],
    "furniture": ["table", "shelf", "chair", "bed", "cupboard", "window", "door", "stove"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "relative": ["mother", "father", "sister", "brother", "aunt", "uncle", "grandmother", "cousin"],
    "job": ["baker", "teacher", "farmer", "doctor", "miller", "tailor", "painter", "sailor", "gardener", "smith"],
    "mood": ["happy", "tired", "sad", "angry", "hungry", "proud", "afraid", "glad", "curious", "surprised"],
    "sky": ["It was raining", "The sun was shining", "It was cold", "There was a strong wind", "It was snowing",
            "The sky was grey", "It was a warm evening", "There was fog over the fields"],
    "how": ["slowly", "quickly", "quietly", "carefully", "at once", "with a smile", "without a word", "again"],
    "kind": ["brig", "barque", "schooner", "cutter", "ketch"],
    "ship": ["Heron", "Swallow", "Good Hope", "Amelia", "North Star", "Petrel", "Margaret", "Sea Horse", "Falcon"],
    "port": ["Bristol", "Lisbon", "Cadiz", "Bergen", "Madeira", "Halifax", "Boston", "Hamburg", "Cork", "Malta"],
    "cargo": ["salt", "timber", "wine", "coal", "wool", "dried fish", "oranges", "iron", "rice", "mail"],
    "sail": ["main topsail", "fore topsail", "jib", "mainsail", "foresail", "mizzen", "topgallants", "staysail"],
    "part": ["long boat", "rudder", "fore hatch", "main yard", "capstan", "bowsprit"],
    "crew": ["Hale", "Brandt", "Moreno", "Doyle", "Larsen", "Pike", "Costa", "Webb", "Quist"],
    "wind": ["NW", "W", "SW", "N", "NE", "S", "SE", "E"],
}  # fmt: skip

EVERYDAY: Grammar = WORDS | {
    "story": [
        "<opening> <event> <event> <turn> <closing>",
        "<opening> <event> <turn> <talk> <closing>",
        "<opening> <talk> <event> <event> <turn> <event> <closing>",
    ],
    "opening": [
        "One <weekday> <hero> went to the <p:place> with <his> <a:animal>.",
        "<hero> was a <j:job> and lived near the <p:place>. <he^> had a <colour> <a:animal> and a <size> <thing>.",
        "<sky>, and <hero> was <mood>. <he^> put on a <colour> coat and went to the <p:place> with the <a:animal>.",
        "In the <room> of <hero>'s <relative> there was a <a:animal> that had come from the <p:place>.",
    ],
    "event": [
        "<he^> found a <size> <t:thing> under the <furniture> and gave the <t> to <friend>.",
        "<he^> looked for the <thing> in the <room>, but it was not there.",
        "The <a> ran to the <place>, and <hero> ran after it.",
        "<he^> gave the <thing> to <friend>, who was very <mood>.",
        "<friend> came <how> from the <place> and asked for some <food>.",
        "Then <he> sat down by the <furniture> and ate <food> and <food>.",
        "On the way home <he> met a <job> with <number> <fruit> in a <size> basket.",
        "<sky>, so they waited in the <room> until the evening.",
        "<he^> took the <colour> <thing> and carried it <how> to the <p>.",
        "There was a <size> <t:thing> in the <room>. <he^> hid the <t> behind the <furniture>.",
    ],
    "turn": [
        "But the <thing> was <size>, and nobody knew why.",
        "Suddenly the <a> stopped in front of a <colour> door.",
        "When <he> opened the <furniture>, there were <number> <fruit> and a <colour> <thing> in it.",
        "Then <friend> told <him> that the <job> had lost a <colour> <thing> at the <p>.",
    ],
    "talk": [
        '"Where is my <thing>?" asked <hero>. "It is in the <room>, on the <furniture>," said <friend>.',
        '"Do you like <food>?" asked <friend>. "Yes, but I like <food> more," said <hero>.',
        '"I am <mood>," said <friend>. "Then come with me to the <place>," said <hero> <how>.',
        '"How many <f:fruit> do you have?" asked <hero>. "I have <number> <f>," said <friend>.',
    ],
    "closing": [
        "In the evening <hero> was <mood> and went home with the <a>.",
        "After that <hero> and <friend> were friends for many years.",
        "<hero> never saw the <job> again.",
        "And the <a> slept by the <furniture> until the next morning.",
    ],
    "sum": [
        "<hero> has <x> <f:fruit>. <he^> buys <y> more. Now <he> has <total> <f>.",
        "<hero> has <total> <f:fruit>. <he^> gives <y> of them to <friend>. Now <he> has <x> <f> left.",
        "There are <x> <f:fruit> on the <furniture> and <y> in the basket. Together there are <total> <f>.",
        "<hero> is <x> years old. In <y> years <he> will be <total> years old.",
        "<x> and <y> are <total>. <total> less <x> are <y>.",
    ],
    "letter": [
        "Dear <friend>,\n<greeting> <news> <news> <wish>\nYours, <hero>",
        "Dear <r:relative>,\n<greeting> <news> <wish>\nWith love, <hero>",
    ],
    "greeting": ["Thank you for the <size> <thing>.", "I hope that you are well.", "How is the <animal>?",
                 "I have not heard from you since <weekday>."],
    "news": [
        "Last <weekday> we went to the <place> and saw a <colour> <animal>.",
        "My <relative> has made <food> with <fruit> for all of us.",
        "The <job> has sold me <number> <fruit> and a <colour> <thing>.",
        "There is a new <thing> in our <room>, and the <animal> does not like it.",
    ],
    "wish": ["Please come and see us on <weekday>.", "Please send me the <colour> <thing>.",
             "Tell me when you are at the <place> again.", "Write soon."],
    "diary": ["<weekday>, <clock> o'clock. <note> <note>", "<weekday>, <clock> o'clock. <note> <note> <note>"],
    "note": [
        "Bought <number> <fruit> and some <food>.", "Met <friend> at the <place>.", "Rain all day.", "Very <mood>.",
        "Lost the <colour> <thing>.", "Went to the <place> with the <animal>.", "Cleaned the <room>.",
        "Wrote to my <relative>.", "Wind and cold; stayed in the <room>.",
    ],
    "list": [
        "For the <place>: <number> <fruit>, <food>, <food>, a <colour> <thing>.",
        "To do on <weekday>: go to the <place>, clean the <room>, write to <friend>.",
        "In the <room>: <number> <fruit>, a <size> <thing>, a <thing> and a <colour> <thing>.",
    ],
    "calendar": [
        "Yesterday was <today>. Today is <tomorrow>, and tomorrow will be <overmorrow>.",
        "If today is <today>, then tomorrow is <tomorrow> and the day after tomorrow is <overmorrow>.",
        "The <place> is closed on <tomorrow>, so <hero> goes there on <today> or on <overmorrow>.",
    ],
    "harbour": [
        "News of the harbour, <date>. <arrival> <departure> <weather>",
        "News of the harbour, <date>. <arrival> <departure> <departure>",
        "<weather>",
        "The <k:kind> <v:ship> left <port> on <date> with <cargo>. <voyage> <voyage> <voyage> <landfall>",
        "<hero> was a sailor on the <k:kind> <v:ship> of <port>. <voyage> <voyage> <landfall>",
    ],
    "arrival": ["Came in: the <kind> <ship> from <port>, with <cargo>, <days> days at sea."],
    "departure": ["Went out: the <kind> <ship> for <port>, with <cargo>. Her master is <crew>."],
    "weather": ["Weather at <hour> on <weekday>: wind <wind>, force <force>, <sea>, glass at <glass> and <trend>."],
    "voyage": [
        "On day <days> the wind went to the <wind>, and the hands took in the <sail>.",
        "The mate set the <sail> again, but the sea was high and the <part> broke.",
        "At <hour> they sighted land to the <wind>, <leagues> leagues off.",
        "They were at lat <lat> and long <long>, on a course of <course>, and made <x> knots.",
        "The <k> shipped much water, and the hands were at the pumps all night.",
        "Seaman <crew> was sick, so the mate stood his watch.", "The cook had no <food> left, only <food> and <food>.",
        "The carpenter mended the <part> with timber and iron.", "They spoke a <kind> of <port> bound for <port>.",
    ],
    "landfall": [
        "The run was <miles> miles, and after <days> days the <v> came to <port>.",
        "At noon on day <days> they saw the light of <port>, and all were well.",
    ],
}  # fmt: skip

SHIP_LOG: Grammar = WORDS | {
    "page": [
        "<title>\n<entries>\n<noon>\n<remark> <signed>",
    ],
    "title": ["Log of the <kind> <ship>, <from> to <to>, with <cargo>. Day <day>, <date>."],
    "noon": ["Noon. Lat <lat>, long <long>. Run <run> miles. Water <water> casks."],
    "entry": [
        "<hour> Wind <wind> <force>, <sea>. Glass <glass>, <trend>. Course <course>, <speed> knots. <work>",
    ],
    "work": ["<sails>", "<sails> <duty>", "<duty>", "<sighting>", "<sighting> <sails>", "<trouble>"],
    "sails": [
        "Set the <sail>.", "Took in the <sail>.", "Reefed the <sail>.", "Shifted the <sail>.", "Bent a new <sail>.",
    ],
    "duty": [
        "Hands at the pumps, <inches> inches in the well.", "Hands mended rope and sail.", "Washed down decks.",
        "Carpenter at work on the <part>.", "Served out <food> and <food>.", "Cook short of <food>.",
        "Sounded, <fathoms> fathoms, sand and shell.", "Aired the hold.",
    ],
    "sighting": [
        "Sighted a <kind> bearing <wind>, <colour> hull.", "Spoke the <kind> <ship> of <port>, <days> days out.",
        "Land bearing <wind>, <leagues> leagues.", "Light of <port> bearing <wind>.", "Whales to the <wind>.",
    ],
    "trouble": [
        "Parted the <sail> sheet; rove a new one.", "Lost a <thing> overboard.", "Seaman <crew> sick, excused duty.",
        "Shipped a heavy sea over the <part>.", "Seaman <crew> asleep on watch, put to the pumps.",
    ],
    "remark": ["All well.", "People in good health.", "One man sick.", "Ship makes some water.",
               "No observation, sky overcast.", "Standing on for <to>."],
    "signed": ["Signed, <crew>, master.", "Signed, <crew>, mate."],
}  # fmt: skip

MEN = ["Tom", "Peter", "Karl", "Ben", "Omar", "Luis", "Ivan", "Hugo", "Sam", "Nils"]
WOMEN = ["Anna", "Maria", "Lucy", "Ella", "Nora", "Sara", "Clara", "Ida", "Rosa", "Mina"]
SEAS = ["sea calm", "sea smooth", "sea slight", "sea moderate", "sea rough", "sea high"]
MONTHS = {"January": 31, "March": 31, "April": 30, "June": 30, "August": 31, "October": 31, "November": 30}


def pick(rng: random.Random, items: list[str]) -> str:
    """One of the items; earlier ones are more likely, by 1/sqrt(rank)."""
    weights = [1 / math.sqrt(rank) for rank in range(1, len(items) + 1)]
    return rng.choices(items, weights)[0]


def expand(rng: random.Random, grammar: Grammar, text: str, memory: Memory) -> str:
    """Replace every <symbol> in `text`: by its value in `memory`, else by one of its lines, which is expanded as well."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        symbol = match["symbol"]
        if name.lower() in memory and not symbol:
            outcome = memory[name.lower()]
        else:
            line = pick(rng, grammar[(symbol or name).lower()])
            outcome = expand(rng, grammar, line, memory)  # a line may hold symbols itself
        if symbol:
            memory[name] = outcome
        if match["capital"] or name[0].isupper():
            return outcome[0].upper() + outcome[1:]
        return outcome

    return re.sub(r"<(?P<name>\w+)(?P<capital>\^?)(:(?P<symbol>\w+))?>", replace, text)


def people(rng: random.Random) -> Memory:
    """A hero with fitting pronouns, and a friend with another name."""
    names, pronouns = WOMEN, {"he": "she", "him": "her", "his": "her"}
    if rng.random() < 0.5:
        names, pronouns = MEN, {"he": "he", "him": "him", "his": "his"}
    hero = pick(rng, names)
    friend = pick(rng, [name for name in MEN + WOMEN if name != hero])
    return {"hero": hero, "friend": friend, **pronouns}


def figures(rng: random.Random) -> Memory:
    """Dates, positions and quantities, each within its bounds."""
    month, days = rng.choice(list(MONTHS.items()))
    bounds = {"x": (1, 30), "y": (1, 20), "day": (2, 60), "days": (3, 50), "water": (5, 60), "miles": (60, 250)}
    bounds |= {"inches": (3, 30), "fathoms": (8, 90), "leagues": (2, 9), "clock": (6, 22)}
    facts = {name: str(rng.randint(*bound)) for name, bound in bounds.items()}
    facts |= {"total": str(int(facts["x"]) + int(facts["y"])), "date": f"{rng.randint(1, days)} {month}"}
    facts |= {"lat": f"{rng.randint(28, 60)} {rng.randint(0, 59):02d} N", "course": f"{5 * rng.randint(0, 71):03d}"}
    return facts | {"long": f"{rng.randint(1, 60)} {rng.randint(0, 59):02d} W"}


def weather(hour: int, force: int, glass: int, change: int) -> Memory:
    """The weather at an hour: the state of the sea depends on the force of the wind, the trend on the change of the glass."""
    trend = "steady"
    if change < 0:
        trend = "falling"
    elif change > 0:
        trend = "rising"
    sea = SEAS[force * 5 // 9]  # wind forces 0 to 9 on six states of the sea
    return {"hour": f"{hour:02d}:00", "force": str(force), "sea": sea, "glass": str(glass), "trend": trend}


def everyday(rng: random.Random) -> str:
    """One document for the base model."""
    kinds = {"story": 6, "sum": 3, "letter": 2, "diary": 2, "list": 1, "calendar": 1, "harbour": 3}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    week = WORDS["weekday"]
    day = rng.randrange(7)
    facts = people(rng) | figures(rng)
    facts |= {"today": week[day], "tomorrow": week[(day + 1) % 7], "overmorrow": week[(day + 2) % 7]}
    facts |= weather(rng.randrange(24), rng.randint(0, 9), rng.randint(980, 1035), rng.randint(-1, 1))
    return articles(expand(rng, EVERYDAY, f"<{kind}>", facts))


def ship_log(rng: random.Random) -> str:
    """One page of a log book for the adapter: the weather changes a little from watch to watch, and the figures agree."""
    start, end = rng.sample(WORDS["port"], 2)
    facts = figures(rng) | {"from": start, "to": end}
    force = rng.randint(1, 8)
    glass = rng.randint(985, 1030)
    entries, speeds = [], []
    for hour in range(0, rng.choice([12, 16]), 4):
        # The glass falls more often than it rises, and the ship sails faster in more wind: a model can learn both.
        change = rng.choice([-4, -3, -2, -1, 0, 1, 2, 3])
        glass += change
        force = min(9, max(0, force + rng.choice([-1, 0, 0, 1])))
        speeds.append(1 + force + rng.choice([0, 0, 1]))
        watch = weather(hour, force, glass, change) | {"speed": str(speeds[-1])}
        entries.append(expand(rng, SHIP_LOG, "<entry>", facts | watch))
    facts |= {"entries": "\n".join(entries), "run": str(24 * sum(speeds) // len(speeds))}
    return articles(expand(rng, SHIP_LOG, "<page>", facts))


def articles(text: str) -> str:
    """`a apple` → `an apple`; for the words of the grammars, the first letter decides."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def text_of(document: Callable[[random.Random], str], seed: str, characters: int) -> str:
    """Documents, each followed by an empty line, until the text has this many characters; `seed` names its use."""
    rng = random.Random(seed)
    parts = []
    length = 0
    while length < characters:
        parts.append(document(rng) + "\n\n")
        length += len(parts[-1])
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, training, quantizing, adapter.
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; every digit is a token, as in Llama's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=512)


def tokens_of(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [N, CONTEXT]: the tokens of a text in rows; the last, incomplete row is left out."""
    # Not verbose: transformers would warn that the text is longer than the model's context.
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = len(ids) // CONTEXT
    return torch.tensor(ids[: rows * CONTEXT]).view(rows, CONTEXT)


def batches(rows: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches of `BATCH` rows; the rows get a new random order whenever all have been used."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rows))])
        yield rows[order[:BATCH]]
        order = order[BATCH:]


def train(model: Any, rows: torch.Tensor, steps: int, rate: float, decay: float) -> None:
    """Train with AdamW: a short warm-up, a cosine down to a tenth of `rate`, clipped gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(rows, steps)):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (0.05 * steps)) * cosine
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"  step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:4.0f} s", flush=True)
    model.eval()


def make_base(tokenizer: PreTrainedTokenizerFast, text: str, out: Path) -> None:
    """Train the Llama in float32, quantize it to NF4 and save it with transformers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,  # grouped-query attention, as in current models
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    train(model, tokens_of(tokenizer, text), BASE_STEPS, BASE_RATE, decay=0.1)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    # bitsandbytes quantizes a checkpoint while it is loaded, so a dense one is needed for a moment.
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        quantized = AutoModelForCausalLM.from_pretrained(dense, quantization_config=nf4, device_map="cpu")
    quantized.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load_base(folder: Path) -> Any:
    """The NF4 checkpoint, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def load_adapted(base: Path, adapter: Path) -> Any:
    """The NF4 checkpoint with the adapter, unmerged, loaded by peft."""
    return PeftModel.from_pretrained(load_base(base), adapter).eval()


def make_adapter(base: Path, rows: torch.Tensor, out: Path) -> None:
    """QLoRA: train LoRA factors on the frozen NF4 base, and save them with a name for the base that is not a path."""
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base), config)
    train(model, rows, ADAPTER_STEPS, ADAPTER_RATE, decay=0.0)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path = BASE_NAME  # peft puts the path on this machine
    saved.target_modules = sorted(saved.target_modules)  # peft has a set, in another order in every process
    model.save_pretrained(out)
    (out / "README.md").unlink()  # peft's empty model card; the README of the demo describes the adapter


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """float32 [N, CONTEXT, VOCABULARY]: log probabilities of every next token."""
    parts = []
    for start in range(0, len(rows), BATCH):
        logits = model(input_ids=rows[start : start + BATCH]).logits.float()
        parts.append(torch.log_softmax(logits, -1))
    return torch.cat(parts)


def loss_of(logs: torch.Tensor, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood per token, in nats."""
    return -logs[:, :-1].gather(-1, rows[:, 1:, None]).mean().item()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) per token, in nats."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def change_by_projection(model: Any) -> dict[str, float]:
    """rms(delta) / rms(weight) of every kind of projection over all layers, and of all of them together."""
    from bitsandbytes.functional import dequantize_4bit

    squares: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            # The weight as training used it, which is the dequantized one.
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            delta = module.get_delta_weight("default")
            for key in (name.rsplit(".", 1)[1], "all"):
                sums = squares.setdefault(key, [0.0, 0.0])
                sums[0] += delta.square().sum().item()
                sums[1] += weight.square().sum().item()
    return {key: math.sqrt(delta / weight) for key, (delta, weight) in squares.items()}


def judge(base: Path, adapter: Path, rows: torch.Tensor) -> None:
    """Print the adapter's gain on held-out text, and how much of it peft's merge, which rounds to nearest, keeps."""
    adapted = load_adapted(base, adapter)
    for key, ratio in change_by_projection(adapted).items():
        print(f"  rms(delta) / rms(weight)  {key:10s} {100 * ratio:.2f} %")
    base_logs = log_probs(load_base(base), rows)
    tuned_logs = log_probs(adapted, rows)
    # A model of its own: in evaluation, bitsandbytes 0.50 repacks NF4 weights on CPUs with AVX512-BF16, and peft 0.21 then
    # merges into the repacked bytes.
    merged_logs = log_probs(load_adapted(base, adapter).merge_and_unload(), rows)
    base_loss = loss_of(base_logs, rows)
    tuned_loss = loss_of(tuned_logs, rows)
    merged_loss = loss_of(merged_logs, rows)
    print(f"  loss: base {base_loss:.4f}, base + adapter {tuned_loss:.4f}, merged by peft {merged_loss:.4f}")
    gain_kept = (base_loss - merged_loss) / (base_loss - tuned_loss)
    base_divergence = divergence(tuned_logs, base_logs)
    kl_ratio = divergence(tuned_logs, merged_logs) / base_divergence
    print(f"  KL(base + adapter || base) {base_divergence:.5f}")
    print(f"  merged by peft: gain kept {gain_kept:.3f}, KL ratio {kl_ratio:.3f}")


def main(out: Path) -> None:
    """Make everything in the folder `out`."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)

    print("text")
    base_text = text_of(everyday, "base", BASE_CHARACTERS)
    calibration = text_of(ship_log, "calibration", TEXT_CHARACTERS)
    heldout = text_of(ship_log, "heldout", TEXT_CHARACTERS)
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")

    print("base")
    # A part of the base's text is enough. The words of the log books must become tokens, too.
    tokenizer = make_tokenizer(base_text[: 3 * TEXT_CHARACTERS] + calibration)
    make_base(tokenizer, base_text, out / "base-nf4")

    print("adapter")
    tokenizer = AutoTokenizer.from_pretrained(out / "base-nf4")  # from here on, everything is read from the files
    make_adapter(out / "base-nf4", tokens_of(tokenizer, calibration), out / "adapter")

    print("numbers")
    judge(out / "base-nf4", out / "adapter", tokens_of(tokenizer, heldout))
    for path in out.rglob("*"):  # safetensors creates files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qmerge.demo.build OUT_DIR")
    main(Path(sys.argv[1]))
