// Texts to begin with, each with the settings that suit it.

/**
 * @typedef {object} Example
 * @property {string} name
 * @property {string} about
 * @property {string} text
 * @property {Partial<import("./options.js").Settings>} settings
 */

/** @type {ReadonlyArray<Example>} */
export const EXAMPLES = [
  {
    name: "is_even, in factorial time",
    about: "A function with an odd demand on it.",
    text: `def is_odd(n: int) -> bool:
    """Whether n is odd, in constant time."""
    return n % 2 == 1


def is_even(n: int) -> bool:
    """Whether n is even, in time proportional to n factorial."""
`,
    settings: { temperature: 0.6, top_p: 0.9, max_tokens: 120, stop: ["\n\n\n"] },
  },
  {
    name: "Questions and answers",
    about: "Three answers show the form; the model gives the fourth.",
    text: `Q: What do bees make from nectar?
A: Honey.

Q: Which planet is closest to the sun?
A: Mercury.

Q: How many legs does a spider have?
A: Eight.

Q: What is frozen water called?
A:`,
    settings: { temperature: 0, top_p: 1, max_tokens: 24, stop: ["\n"] },
  },
  {
    name: "A story",
    about: "News from an island that was on no map.",
    text: `The survey ship was three days north of the last chart when its crew found the island, and on \
it a herd of white horses, each with a single spiral horn. Nobody had expected unicorns. What they had \
expected even less was to be greeted, politely and in four languages, by the oldest of them.

"You are late," it said,`,
    settings: { temperature: 0.9, top_p: 0.95, max_tokens: 200 },
  },
  {
    name: "Code",
    about: "A class that wants its methods.",
    text: `import collections


class Graph:
    """A directed graph, as lists of neighbours."""

    def __init__(self):
        self.neighbours = collections.defaultdict(list)

    def add_edge(self, start, end):
        self.neighbours[start].append(end)

    def shortest_path(self, start, goal):
        """Returns the nodes on a shortest path, by breadth-first search."""
`,
    settings: { temperature: 0.3, top_p: 0.95, max_tokens: 160, stop: ["\n\n\n"] },
  },
];
