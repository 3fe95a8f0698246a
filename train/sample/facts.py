"""The facts of the bundled sample's world: tables of words, and rules for numbers and letters.

plural       mouse      mice            capital      Peru       Lima
opposite     hot        cold            hexadecimal  27         1b
opposite     cold       hot             sum          23 and 45  68
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """("plural", "mouse", "mice"), ("sum", "23 and 45", "68"), ("hexadecimal", "27", "1b")."""

    kind: str
    subject: str
    answer: str


def _pairs(text: str) -> list[tuple[str, str]]:
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=True))


OPPOSITES = _pairs("""
    hot cold big small tall short fast slow young old happy sad heavy light bright dark
    strong weak rich poor clean dirty early late empty full easy difficult hard soft high low
    thick thin wide narrow wet dry loud quiet near far right wrong true false good bad
    sharp blunt smooth rough sweet bitter deep shallow brave cowardly polite rude
    safe dangerous simple complex tight loose alive dead asleep awake cheap expensive
    beautiful ugly public private ancient modern guilty innocent temporary permanent
    visible hidden odd even positive negative major minor maximum minimum inside outside
    above below before after always never begin end buy sell push pull win lose love hate
    give take laugh cry arrive depart accept refuse remember forget float sink
    success failure friend enemy day night north south east west war peace summer winter
    entrance exit increase decrease victory defeat
""")

PLURALS = _pairs("""
    mouse mice child children man men woman women foot feet tooth teeth goose geese ox oxen
    leaf leaves knife knives wolf wolves life lives wife wives shelf shelves thief thieves
    loaf loaves half halves calf calves baby babies city cities story stories lady ladies
    berry berries country countries party parties family families fly flies box boxes
    fox foxes bus buses dish dishes watch watches church churches glass glasses brush brushes
    peach peaches class classes tomato tomatoes potato potatoes hero heroes cat cats dog dogs
    horse horses cow cows bird birds book books table tables chair chairs house houses
    tree trees river rivers car cars boat boats train trains shoe shoes hat hats pen pens
    cup cups spoon spoons bottle bottles window windows door doors road roads bridge bridges
    garden gardens flower flowers cloud clouds star stars
""")

PAST_TENSES = _pairs("""
    go went eat ate see saw run ran take took give gave come came find found think thought
    buy bought bring brought catch caught teach taught fight fought sing sang drink drank
    swim swam begin began ring rang write wrote drive drove ride rode speak spoke break broke
    wake woke choose chose steal stole wear wore tear tore know knew grow grew throw threw
    fly flew draw drew blow blew sleep slept keep kept feel felt leave left meet met lose lost
    tell told sell sold send sent spend spent build built make made say said pay paid
    hear heard stand stood win won sit sat hold held fall fell forget forgot get got hide hid
    bite bit shake shook freeze froze rise rose sink sank walk walked play played jump jumped
    cook cooked help helped open opened work worked wash washed climb climbed carry carried
    study studied stop stopped
""")

CATEGORIES = {
    "bird": "robin eagle owl duck goose swan penguin parrot crow sparrow hen turkey pigeon",
    "fish": "salmon trout shark tuna cod eel",
    "fruit": "apple banana orange pear peach grape cherry plum lemon mango strawberry",
    "vegetable": "carrot potato onion cabbage spinach broccoli cucumber lettuce pumpkin",
    "tool": "hammer saw drill wrench axe spade rake",
    "vehicle": "car bus train bicycle truck boat ship tram",
    "instrument": "piano violin guitar flute drum trumpet harp",
    "insect": "ant bee wasp beetle moth butterfly mosquito cricket",
    "mammal": "dog cat horse cow sheep pig goat wolf fox lion tiger bear mouse elephant whale"
    " rabbit seal kangaroo",
    "clothing": "shirt hat coat glove scarf sock skirt sweater",
    "furniture": "table chair bed sofa desk shelf cupboard",
    "tree": "oak pine maple birch willow",
    "flower": "rose tulip lily daisy violet",
}

CAPITALS = _pairs("""
    France Paris Germany Berlin Italy Rome Spain Madrid Portugal Lisbon Austria Vienna
    Greece Athens Poland Warsaw Hungary Budapest Sweden Stockholm Norway Oslo Finland Helsinki
    Denmark Copenhagen Ireland Dublin England London Scotland Edinburgh Belgium Brussels
    Russia Moscow Ukraine Kyiv Turkey Ankara Egypt Cairo Kenya Nairobi Ghana Accra
    Senegal Dakar Morocco Rabat Tunisia Tunis Iran Tehran Iraq Baghdad Syria Damascus
    Lebanon Beirut India Delhi Nepal Kathmandu China Beijing Japan Tokyo Thailand Bangkok
    Vietnam Hanoi Indonesia Jakarta Australia Canberra Canada Ottawa Cuba Havana
    Jamaica Kingston Peru Lima Chile Santiago Ecuador Quito Colombia Bogota Venezuela Caracas
    Croatia Zagreb Serbia Belgrade Bulgaria Sofia Romania Bucharest Iceland Reykjavik
    Latvia Riga
""")

COLOURS = {
    "yellow": "bananas lemons canaries butter daffodils",
    "red": "tomatoes strawberries cherries blood rubies ladybirds",
    "green": "grass cucumbers lettuce spinach frogs emeralds peas",
    "white": "snow milk salt swans flour rice",
    "black": "coal tar ravens soot",
    "orange": "carrots pumpkins apricots",
    "blue": "sapphires bluebells jeans",
    "brown": "chocolate mud coffee chestnuts",
    "grey": "elephants ash fog lead",
    "pink": "flamingos pigs",
}

YOUNG = _pairs("""
    cat kitten dog puppy cow calf horse foal sheep lamb pig piglet goat kid lion cub
    duck duckling goose gosling swan cygnet deer fawn frog tadpole hen chick eagle eaglet
    owl owlet kangaroo joey seal pup hare leveret fish fry eel elver spider spiderling
    pigeon squab turkey poult bear cub zebra foal elephant calf whale calf
""")

LARGEST_TERM = 50
LARGEST_DECIMAL = 127


def all_facts() -> list[Fact]:
    """Every fact of the world."""
    tables = {
        "opposite": [pair for s, a in OPPOSITES for pair in ((s, a), (a, s))],
        "plural": PLURALS,
        "past": PAST_TENSES,
        "category": [(s, kind) for kind, text in CATEGORIES.items() for s in text.split()],
        "capital": CAPITALS,
        "colour": [(s, colour) for colour, text in COLOURS.items() for s in text.split()],
        "young": YOUNG,
        "hexadecimal": [(str(n), f"{n:x}") for n in range(LARGEST_DECIMAL + 1)],
    }
    found = [Fact(kind, s, a) for kind, pairs in tables.items() for s, a in pairs]
    words = dict.fromkeys(fact.subject for fact in found if fact.subject.islower())
    letters = [Fact("letter", word, word[0]) for word in words]
    terms = range(1, LARGEST_TERM + 1)
    sums = [Fact("sum", f"{a} and {b}", str(a + b)) for a in terms for b in terms]
    return found + letters + sums
