"""Writes harbour.txt, the text that jaxllm's own training runs read: the log of a harbour that never was.

    python docs/examples/harbour.py > docs/examples/harbour.txt

Every sentence is made from a small grammar, the same ones for the same seed. What ties it together reaches further
than a pair of letters: a ship leaves with the name, the cargo and the berth that it came with, and tides take turns.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

SHIPS = "Aurora Bellona Calypso Dorothea Esperance Fortuna Galatea Halcyon Iphigenia Juno Kestrel Leda".split()
HOMES = "Bergen Cadiz Dundee Emden Funchal Genoa Hull Riga Trieste Valletta".split()
CARGO = ("barley", "copper ore", "dried figs", "flax", "lamp oil", "oak timber", "salt", "slate", "tin", "wool")
BERTHS = ("first", "second", "third", "fourth", "fifth", "sixth")
WINDS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
FORCE = ("light", "fresh", "strong")
SKIES = ("clear", "grey", "hazy", "low and wet")
CRANES = ("the old crane unloads", "the steam crane unloads", "both cranes unload")


def days(seed: int, count: int) -> Iterator[str]:
    """A paragraph a day."""
    draw = random.Random(seed)
    moored: dict[str, tuple[str, str, str, int]] = {}  # berth -> ship, home, cargo, casks or bales
    wind = 0
    for day in range(1, count + 1):
        wind = (wind + draw.choice((-1, 0, 0, 1))) % len(WINDS)
        hour = 3 + day % 7
        lines = [
            f"Day {day}. The wind is {draw.choice(FORCE)} from the {WINDS[wind]} and the sky is {draw.choice(SKIES)}.",
            f"High water is at {hour} in the morning and again at {hour} in the evening.",
        ]
        for berth in list(moored):
            ship, home, cargo, amount = moored[berth]
            what = "her last" if amount < 20 else "her"
            if draw.random() < 0.4:
                del moored[berth]
                lines.append(f"The {ship} of {home} leaves the {berth} berth without her {cargo}.")
            else:
                lines.append(f"The {ship} lies at the {berth} berth; {draw.choice(CRANES)} {what} {cargo}.")
        for _ in range(draw.choice((0, 1, 1, 2))):
            free = [berth for berth in BERTHS if berth not in moored]
            away = [ship for ship in SHIPS if all(ship != here for here, *_ in moored.values())]
            if free and away:
                berth, ship = free[0], draw.choice(away)
                home, cargo, amount = draw.choice(HOMES), draw.choice(CARGO), draw.randint(2, 90)
                moored[berth] = (ship, home, cargo, amount)
                lines.append(f"The {ship} of {home} comes in with {amount} tons of {cargo} and takes the {berth} berth.")
        if not moored:
            lines.append("No ship is in the harbour.")
        yield "\n".join(lines) + "\n\n"


def main() -> int:
    sys.stdout.write("".join(days(seed=1912, count=400)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
