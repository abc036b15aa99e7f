"""A table in memory that knows what each of its values must be, and changes while it waits for orders.

table.py MIB STATUS CONTROL: appends `READY`, `CHECK n values=.. wrong=..` and `DONE n values=.. wrong=..` to STATUS;
orders `check n` and `quit n` come in CONTROL. Ends by itself when CONTROL has been gone for a while.
"""

import hashlib
import random
import sys
import time

mib, status, control = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def value(index, generation):
    return hashlib.blake2b(b"%d %d" % (index, generation)).digest() * 16


def say(line):
    with open(status, "a") as out:
        out.write(line + "\n")


def order():
    try:
        with open(control) as orders:
            word, number = orders.read().split()
            return word, int(number)
    except ValueError:
        return "", 0


def wrong():
    return sum(table["key %d" % index] != value(index, made) for index, made in enumerate(generations))


generations = [1] * (mib * 1024)
table = {"key %d" % index: value(index, 1) for index in range(len(generations))}
say("READY values=%d" % len(table))
done, missing = 0, 0
while missing < 500:
    try:
        word, number = order()
        missing = 0
    except FileNotFoundError:
        missing += 1
        word, number = "", 0
    if number > done:
        done = number
        say("%s %d values=%d wrong=%d" % ("DONE" if word == "quit" else "CHECK", number, len(table), wrong()))
        if word == "quit":
            break
    for index in random.sample(range(len(generations)), 100):
        generations[index] += 1
        table["key %d" % index] = value(index, generations[index])
    time.sleep(0.01)
