"""The wording of the procedural problems."""

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Noah", "Rosa", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "pens", "shells", "stamps", "toys")

# The text of a problem and its plan. In a plan, letters are the numbers of the text and 1, 2
# are the results of earlier steps.
TEMPLATES: tuple[tuple[str, str], ...] = (
    (
        "{name} collects {a} {thing} in the morning and {b} in the afternoon, then gives {c} "
        "{thing} to {other}. How many {thing} does {name} have left?",
        "a + b, 1 - c",
    ),
    (
        "A box holds {a} red {thing} and {b} blue {thing}. {name} buys {c} boxes that are all "
        "the same. How many {thing} does {name} buy?",
        "a + b, 1 x c",
    ),
    (
        "{name} has {a} bags with {b} {thing} in each bag. Later {other} brings {c} more "
        "{thing}. How many {thing} are there in total?",
        "a x b, 1 + c",
    ),
    (
        "{name} fills {a} shelves with {b} {thing} on each shelf. In the afternoon {other} sells "
        "{c} {thing}. How many {thing} are left on the shelves?",
        "a x b, 1 - c",
    ),
    (
        "Each box holds {a} {thing}, but {b} of them are broken. {name} buys {c} boxes that are "
        "all the same. How many good {thing} does {name} get?",
        "a - b, 1 x c",
    ),
    (
        "There are {a} {thing} in a shop. In the morning {name} buys {b} and {other} buys {c} "
        "of them. How many {thing} are left in the shop?",
        "a - b, 1 - c",
    ),
    (
        "{name} finds {a} {thing}, {other} finds {b} {thing}, and later they buy {c} more. How "
        "many {thing} do {name} and {other} have in total?",
        "a + b, 1 + c",
    ),
    (
        "{name} has {a} {thing} and loses {b} of them on the way. Later {other} gives {name} {c} "
        "{thing}. How many {thing} does {name} have now?",
        "a - b, 1 + c",
    ),
    (
        "{name} has {a} {thing}. {other} has {b} more {thing} than {name}. How many {thing} do "
        "{name} and {other} have in total?",
        "a + b, 1 + a",
    ),
    (
        "{name} has {a} {thing}. {other} has {b} times as many {thing} as {name}, and then finds "
        "{c} more. How many {thing} does {other} have now?",
        "a x b, 1 + c",
    ),
    (
        "{name} has {a} {thing} at home. In the shop {name} buys {b} boxes with {c} {thing} in "
        "each box. How many {thing} does {name} have now?",
        "b x c, 1 + a",
    ),
    (
        "{name} has {a} {thing} and gives {b} {thing} to each of {c} friends in the morning. How "
        "many {thing} does {name} have left?",
        "b x c, a - 1",
    ),
    (
        "{name} buys {a} bags with {b} {thing} in each bag and finds {c} more. Then {name} gives "
        "{d} to {other}. How many {thing} does {name} have left?",
        "a x b, 1 + c, 2 - d",
    ),
    (
        "{name} makes {a} red and {b} blue {thing} a day. After {c} days {name} sells {d} of "
        "them. How many {thing} does {name} have left?",
        "a + b, 1 x c, 2 - d",
    ),
    (
        "{name} fills {a} boxes with {b} {thing} in each, and {other} fills {c} bags with {d} "
        "{thing} in each. How many {thing} are there in total?",
        "a x b, c x d, 1 + 2",
    ),
    (
        "A bus has {a} people. At the first stop {b} get on, then {c} get off, and at the next "
        "stop {d} get off. How many people are left?",
        "a + b, 1 - c, 2 - d",
    ),
)
