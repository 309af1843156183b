"""Units of measure: what a calculation's unit becomes in the unit of its result."""

from fractions import Fraction

# Sizes within a family: whatever unit has size 1 does not matter, only their ratios do.
_FAMILIES: dict[str, dict[str, Fraction | int]] = {
    "time": {
        "second sec": 1,
        "minute min": 60,
        "hour hr": 3_600,
        "day": 86_400,
        "week": 604_800,
        "month": 365 * 7_200,
        "year": 365 * 86_400,
        "decade": 3650 * 86_400,
    },
    "length": {
        "millimeter millimetre mm": Fraction(1, 1_000),
        "centimeter centimetre cm": Fraction(1, 100),
        "meter metre m": 1,
        "kilometer kilometre km": 1_000,
        "inch inches": Fraction("0.0254"),
        "foot feet ft": Fraction("0.3048"),
        "yard yd": Fraction("0.9144"),
        "mile mi": Fraction("1609.344"),
    },
    "weight": {
        "milligram mg": Fraction(1, 1_000),
        "gram g": 1,
        "kilogram kilo kg": 1_000,
        "ounce oz": Fraction("28.349523125"),
        "pound lb": Fraction("453.59237"),
        "ton": Fraction("907184.74"),
    },
    "volume": {
        "teaspoon tsp": Fraction(1, 6),
        "tablespoon tbsp": Fraction(1, 2),
        "ounce oz": 1,
        "cup": 8,
        "pint pt": 16,
        "quart qt": 32,
        "gallon gal": 128,
    },
    "metric volume": {"milliliter millilitre ml": 1, "liter litre l": 1_000},
    "money": {"cent penny pennies ¢": 1, "nickel": 5, "dime": 10, "quarter": 25, "dollar $": 100},
}

# Of each unit, by its name: its size in each family that knows it (an ounce is in two).
_SIZES: dict[str, dict[str, Fraction]] = {}
for _family, _units in _FAMILIES.items():
    for _names, _size in _units.items():
        for _name in _names.split():
            _SIZES.setdefault(_name, {})[_family] = Fraction(_size)


def unit_sizes(word: str) -> dict[str, Fraction]:
    """Sizes of a unit by family, from its name in singular or plural; empty for other words."""
    name = word.lower().strip(".")
    return _SIZES.get(name) or _SIZES.get(name.removesuffix("s"), {})
