"""What the pictures have in common."""

from pathlib import Path


# Okabe and Ito's colours, which people with any colour blindness tell apart; hatches serve in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


def short_names(names: list[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, max(len(Path(name).parts) for name in names) + 1):
        short = ["/".join(Path(name).parts[-parts:]) for name in names]
        if len({*short}) == len(names):
            return short
    return names


def names_of(models: list[str], names: list[str] | None) -> list[str]:
    """What models are called in pictures: `names` if there are any, else the last parts of their paths.

    Raises:
        ValueError: there is not one for each model, or two are alike.
    """
    names = names or short_names(models)
    if len(names) != len(models):
        raise ValueError(f"names is {names} for {len(models)} models; give one for each")
    if len({*names}) < len(names):
        raise ValueError(f"two models have one name: {names}; give each another with --names")
    return names
