"""The text of the demo model, written by two small grammars: `EVERYDAY` for the base, `SHIP_LOG` for the adapter.

`<symbol>` becomes one of the symbol's lines; `<x:symbol>` does the same and remembers the outcome as <x>; `<Symbol>` and
`<symbol^>` start with a capital letter. Earlier lines are more likely. Facts that need arithmetic come from the functions
further down, by way of the memory.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

Memory = dict[str, str]
Grammar = dict[str, list[str]]

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


def telegram(rng: random.Random) -> str:
    """One document for a second adapter: what the base knows, without articles, and with STOP at the end of a sentence."""
    text = re.sub(r"\b(?:an?|the) ", "", everyday(rng), flags=re.IGNORECASE)
    return re.sub(r"\.(?=\s|$)", " STOP", text)
