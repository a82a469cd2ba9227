"""What the reviews are about: eleven topics with their subjects, aspects, people and plain facts.

No fact and no name uses a word of the lexicon, so a fact is neutral by construction (a test holds this).
"""

from dataclasses import dataclass, field

STREETS = (
    "Mill Street, Station Road, Castle Lane, Bridge Street, Church Row, Harbour Road, Queen Street, "
    "Orchard Lane, Market Square, Tower Hill, Park Avenue, School Lane, Baker Street, River Walk, Abbey Road, "
    "Forge Lane, Elm Grove, Canal Street, Chapel Hill, Weavers Row"
).split(", ")
TOWNS = (
    "Alderton, Brackley, Colmouth, Dunsford, Eastwick, Farley, Glenmore, Hartwell, Inverloch, Kelsby, Langport, "
    "Marlow, Norbury, Otterbourne, Penrose, Ramsey, Selby, Tilbrook, Upton, Westhaven"
).split(", ")
SURNAMES = (
    "Adler Baptiste Chen Duarte Ekberg Fontaine Goldman Haddad Ito Jansen Kowalski Lindgren Mbeki Novak"
).split()
BRANDS = "Novex, Tarlo, Brimm, Kelvo, Ostra, Pindle, Quorra, Vantis, Zephyr, Lumo".split(", ")
TITLES = [
    f"The {first} {second}"
    for first in "Silver Last Northern Hidden Blue Paper Second Winter Distant Seventh Glass Crooked".split()
    for second in "Harbour Garden Letter River Mirror Lantern Island Orchard Bridge Clock Station Sparrow".split()
]
RELATIVES = "sister brother mother father cousin aunt uncle neighbour partner colleague daughter son flatmate".split()
COMPANIONS = [f"my {person}" for person in RELATIVES] + ["two friends", "an old friend", "the children", "my parents"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
DECADES = "twenties thirties forties fifties sixties seventies eighties nineties".split()
NUMBERS = "two three four five six seven eight nine ten twelve".split()


@dataclass(frozen=True)
class Topic:
    """One kind of thing to review. Slots in braces are filled from the tables above."""

    subjects: tuple[str, ...]  # noun phrases that a prompt names
    short: str  # how the answer refers to it: "the film"
    aspects: dict[str, tuple[str, ...]]  # adjective class -> nouns; a plural noun is marked with a star
    feelers: tuple[str, ...]  # who judges, besides "I" and "we"
    performers: tuple[tuple[str, str], ...]  # (who, past verb) for "the band played well"
    facts: tuple[str, ...]
    back: tuple[str, ...]  # "I would gladly ..."
    audience: tuple[str, ...] = field(default=("anyone", "my friends", "a friend", "families", "most people"))


TOPICS: dict[str, Topic] = {
    "film": Topic(
        ('the film "{title}"', 'the new film "{title}"'),
        "film",
        {
            "story": ("plot", "script", "story", "ending", "dialogue", "opening scene", "jokes*"),
            "people": ("leading actor", "young cast", "narrator"),
            "music": ("soundtrack", "score"),
            "any": ("camera work", "costumes*", "pace", "special effects*", "lighting"),
        },
        ("the audience", "my {relative}", "the whole row", "the critics"),
        (("the lead", "acted"), ("the cast", "sang"), ("the director", "handled the final scene")),
        (
            "It runs for about {number} quarters of an hour.",
            "We saw it on a {day} evening.",
            "It is set in {town} in the {decade}.",
            "The story follows a family from {town}.",
            "I watched it with {companion} in {month}.",
        ),
        ("watch it again", "see it a second time", "see the sequel"),
    ),
    "book": Topic(
        ('the novel "{title}"', 'the book "{title}" by {surname}', "the latest novel by {surname}"),
        "book",
        {
            "story": ("plot", "first chapter", "ending", "heroine", "dialogue", "middle part", "characters*", "style"),
            "any": ("cover", "translation", "maps*", "language", "pace"),
        },
        ("my {relative}", "our reading group", "the critics"),
        (("the author", "writes"), ("the translator", "worked"), ("the author", "handled the last chapter")),
        (
            "It has {number} long chapters.",
            "I read it on the train to {town}.",
            "It tells of two families in {town}.",
            "My {relative} lent it to me in {month}.",
            "I finished it in {number} days.",
        ),
        ("read it again", "read the next one", "give it to my {relative}"),
    ),
    "café": Topic(
        ("the café on {street}", "the bakery on {street}", "the tea room on {street}", "the coffee bar in {town}"),
        "place",
        {
            "food": (
                "coffee",
                "apple cake",
                "soup",
                "bread",
                "cheese toast",
                "sandwiches*",
                "pastries*",
                "lemon tart",
            ),
            "people": ("waiter", "staff", "owner", "baker"),
            "place": ("back room", "terrace", "window seats*", "tables*"),
            "any": ("menu", "choice of teas", "prices*", "music"),
        },
        ("my {relative}", "the children", "the other guests"),
        (("the cook", "baked"), ("the waiter", "explained the menu"), ("the kitchen", "worked")),
        (
            "It opens at {number} in the morning.",
            "We went there on a {day} with {companion}.",
            "There are about {number} tables by the window.",
            "I ordered soup and a pot of tea.",
            "It is {number} minutes from the station.",
        ),
        ("go back", "have lunch there again", "return with {companion}"),
    ),
    "restaurant": Topic(
        (
            "the restaurant on {street}",
            "the noodle bar on {street}",
            "the pizzeria on {street}",
            "the fish restaurant in {town}",
        ),
        "restaurant",
        {
            "food": (
                "soup",
                "main course",
                "noodles*",
                "fish",
                "salad",
                "dessert",
                "house wine",
                "starters*",
                "sauce",
            ),
            "people": ("waiter", "chef", "staff", "owner"),
            "place": ("dining room", "garden", "upper floor"),
            "any": ("menu", "service", "wine list", "prices*"),
        },
        ("my {relative}", "our guests", "the children", "the whole table"),
        (("the chef", "cooked"), ("the kitchen", "worked"), ("the waiter", "served us")),
        (
            "We booked a table for {number}.",
            "We had dinner there on a {day} in {month}.",
            "The main course came after {number} minutes.",
            "I went there with {companion}.",
            "It has been on the corner for {number} years.",
        ),
        ("go back", "eat there again", "book another table"),
    ),
    "hotel": Topic(
        (
            "the {surname} Hotel in {town}",
            "the guest house in {town}",
            "the hostel on {street}",
            "the hotel by the sea in {town}",
        ),
        "hotel",
        {
            "place": ("room", "bathroom", "lobby", "garden", "pool", "balcony", "corridors*", "view"),
            "people": ("receptionist", "porter", "staff", "night manager"),
            "food": ("breakfast", "evening meal", "coffee"),
            "any": ("bed", "service", "location", "towels*"),
        },
        ("my {relative}", "the children", "the other guests"),
        (("the staff", "cleaned"), ("the porter", "looked after us"), ("the kitchen", "cooked")),
        (
            "We stayed for {number} nights in {month}.",
            "Our room was on the {ordinal} floor.",
            "It is {number} minutes from the beach.",
            "We arrived late on a {day}.",
            "I travelled there with {companion}.",
        ),
        ("stay there again", "book another week", "go back in {month}"),
    ),
    "gadget": Topic(
        tuple(
            f"the {{brand}} {thing}"
            for thing in "kettle,toaster,camera,phone,desk lamp,watch,speaker,printer,vacuum cleaner,"
            "tablet,radio".split(",")
        ),
        "device",
        {
            "device": ("battery", "handle", "power switch", "display", "buttons*", "app", "case", "hinge", "charger"),
            "any": ("design", "sound", "manual", "packaging", "finish", "price", "colours*"),
            "people": ("support team", "man on the hotline"),
        },
        ("my {relative}", "the whole office", "our testers"),
        (("the motor", "ran"), ("the app", "worked"), ("the sensor", "responded")),
        (
            "I bought it in {month} for my {relative}.",
            "It weighs about {number} hundred grams.",
            "I have used it for {number} weeks.",
            "It comes with {number} spare parts.",
            "It replaced one that was {number} years old.",
        ),
        ("buy it again", "order another one", "give one to my {relative}"),
    ),
    "concert": Topic(
        tuple(
            f"the {kind} concert {{place}}"
            for kind in "jazz,choir,piano,folk,brass,string quartet,youth orchestra".split(",")
        ),
        "concert",
        {
            "music": ("first half", "encore", "slow movement", "last song", "solos*", "overture", "rhythm"),
            "people": ("singer", "conductor", "pianist", "drummer", "announcer"),
            "place": ("hall", "foyer", "stage", "seats*"),
            "any": ("programme", "sound", "lighting", "choice of songs"),
        },
        ("the audience", "my {relative}", "the back row", "the reporters"),
        (
            ("the band", "played"),
            ("the soloist", "sang"),
            ("the musicians", "listened to each other"),
            ("the trumpets", "came in"),
        ),
        (
            "It lasted for {number} quarters of an hour.",
            "I went with {companion} on a {day}.",
            "There were {number} encores.",
            "The players came from {town}.",
            "Our seats were in the {ordinal} row.",
        ),
        ("hear them again", "go to the next one", "buy the recording"),
    ),
    "walk": Topic(
        (
            "the walk from {town} to {town}",
            "the path around the lake in {town}",
            "the hill walk near {town}",
            "the boat trip from {town}",
        ),
        "trip",
        {
            "place": ("view", "path", "valley", "picnic spot", "old mill", "shore", "villages*", "car park"),
            "people": ("guide", "ferryman", "driver"),
            "food": ("packed lunch", "soup at the inn"),
            "any": ("weather", "map", "signposts*", "last mile", "start"),
        },
        ("my {relative}", "the children", "the whole group"),
        (("the guide", "led us"), ("the guide", "told the old stories"), ("the driver", "drove")),
        (
            "It took us {number} hours with a break.",
            "We set out early on a {day} in {month}.",
            "I went with {companion}.",
            "The route passes {number} farms and a mill.",
            "We took the bus back to {town}.",
        ),
        ("do it again", "go there again in {month}", "take {companion} there"),
    ),
    "museum": Topic(
        tuple(
            f"the {kind} museum in {{town}}"
            for kind in "clock,railway,toy,glass,textile,maritime,pottery,farm".split(",")
        ),
        "museum",
        {
            "place": ("main hall", "courtyard", "upper gallery", "entrance", "rooms*"),
            "people": ("guide", "attendant", "woman at the desk"),
            "story": ("audio tour", "labels*", "short film", "children's quiz"),
            "any": ("collection", "shop", "new wing", "models*", "display of tools"),
        },
        ("my {relative}", "the children", "the school class", "the visitors"),
        (("the guide", "explained the machines"), ("the curators", "arranged the cases"), ("the speaker", "talked")),
        (
            "We spent {number} hours there on a {day}.",
            "The ticket cost {number} pounds.",
            "It has {number} rooms on two floors.",
            "I visited it in {month} with {companion}.",
            "It stands next to the old mill.",
        ),
        ("go back", "visit it again", "bring {companion}"),
    ),
    "play": Topic(
        ('the play "{title}"', "the school play in {town}", "the musical {place}", "the puppet show {place}"),
        "show",
        {
            "story": ("plot", "first act", "second act", "ending", "dialogue", "final scene", "jokes*"),
            "people": ("leading lady", "young hero", "chorus", "usher"),
            "music": ("songs*", "overture", "finale"),
            "any": ("costumes*", "set", "lighting", "staging"),
        },
        ("the audience", "my {relative}", "the critics", "the front row"),
        (("the cast", "acted"), ("the chorus", "sang"), ("the dancers", "moved")),
        (
            "It has {number} acts and one interval.",
            "We sat in the {ordinal} row.",
            "I saw it with {companion} on a {day}.",
            "It is on until the end of {month}.",
            "There were {number} actors on the stage.",
        ),
        ("see it again", "go a second time", "take {companion} to it"),
    ),
    "course": Topic(
        tuple(
            f"the {kind} class {{place}}"
            for kind in "pottery,cooking,drawing,Spanish,yoga,dance,sewing,photography,chess".split(",")
        ),
        "course",
        {
            "people": ("teacher", "assistant", "other students*", "organiser"),
            "story": ("first lesson", "homework", "course book", "exercises*", "final session"),
            "place": ("room", "workshop", "studio"),
            "any": ("timetable", "pace", "equipment", "price"),
        },
        ("my {relative}", "the whole class", "the beginners"),
        (("the teacher", "explained things"), ("the assistant", "helped us"), ("the teacher", "prepared the lessons")),
        (
            "It runs for {number} weeks from {month}.",
            "We met every {day} evening.",
            "I signed up with {companion}.",
            "There were {number} of us in the room.",
            "Each lesson lasts for about {number} quarters of an hour.",
        ),
        ("take it again", "sign up for the next one", "join again in {month}"),
    ),
}
