"""Templates of training prompts: arithmetic stories, exercises and coding requests, written for this project.

A template names slots: `{name}`, `{item}`, ... are drawn from `WORDS`; `{n:2-12}` is a number in that range. A slot
repeated with the same label (`{name.a}`) gets the same value.
"""

from __future__ import annotations

import random
import re

WORDS: dict[str, tuple[str, ...]] = {
    "name": ("Mia", "Omar", "Sofia", "Liam", "Priya", "Noah", "Aiko", "Diego", "Hannah", "Kofi", "Elena", "Marcus",
             "Ruth", "Tomas", "Grace", "Ivan", "Leila", "Peter", "Nadia", "Sam", "Carla", "Ben", "Yusuf", "Olivia"),
    "item": ("apples", "pencils", "marbles", "stickers", "books", "cookies", "cards", "balloons", "oranges", "toy cars",
             "bracelets", "candles", "muffins", "notebooks", "shells", "stamps", "tulips", "cupcakes", "bottles"),
    "place": ("the market", "a bakery", "the school fair", "a bookshop", "the farm", "a toy store", "the library",
              "a garden center", "the museum shop", "a grocery store"),
    "animal": ("chickens", "cows", "rabbits", "goats", "horses", "sheep", "ducks", "pigs"),
    "vehicle": ("car", "train", "bus", "truck", "bicycle", "boat"),
    "job": ("washing cars", "walking dogs", "tutoring", "mowing lawns", "babysitting", "delivering newspapers",
            "painting fences", "selling lemonade"),
    "container": ("boxes", "bags", "baskets", "shelves", "jars", "crates"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "food": ("pizza", "soup", "bread", "pancakes", "pasta", "salad", "chocolate cake"),
    "thing": ("a list of integers", "a list of strings", "a string", "a dictionary", "a tuple of numbers",
              "a nested list", "a sorted array", "a matrix given as a list of rows", "two lists", "two strings"),
    "verdict": ("is a palindrome", "is sorted in ascending order", "contains duplicates", "is empty",
                "contains only digits", "starts with a vowel", "has balanced parentheses", "is a valid email address",
                "is a power of two", "is a prime number", "is a leap year", "is a perfect square", "is an anagram"),
    "quantity": ("the sum of the even numbers", "the product of all elements", "the second largest value",
                 "the most frequent element", "the number of vowels", "the number of words", "the longest word",
                 "the average of the values", "the median", "the difference between the largest and smallest value",
                 "the number of unique elements", "the index of the smallest element", "the sum of the squares",
                 "the longest common prefix", "the number of uppercase letters", "the sum of the digits"),
    "change": ("reverses it", "removes all duplicates from it", "sorts it in descending order", "rotates it to the left",
               "flattens it", "swaps its first and last elements", "removes all spaces from it", "shuffles it",
               "converts every letter to uppercase", "splits it into chunks of equal size", "merges it with another",
               "filters out the negative numbers", "doubles every element", "groups its elements by length",
               "counts how often each element occurs", "capitalizes every word"),
    "algorithm": ("binary search", "bubble sort", "merge sort", "quick sort", "insertion sort", "breadth-first search",
                  "depth-first search", "the sieve of Eratosthenes", "the Euclidean algorithm for the greatest common "
                  "divisor", "matrix multiplication", "run-length encoding", "a Caesar cipher", "linear search",
                  "selection sort", "the Fibonacci sequence with memoization", "Dijkstra's algorithm"),
    "structure": ("stack", "queue", "linked list", "binary search tree", "priority queue", "graph", "hash map", "set",
                  "bank account", "shopping cart", "timer", "matrix", "library of books", "parking lot", "student"),
    "unit": ("Celsius to Fahrenheit", "kilometers to miles", "pounds to kilograms", "seconds to hours, minutes and "
             "seconds", "decimal to binary", "binary to decimal", "Roman numerals to integers", "integers to Roman "
             "numerals", "hours to minutes", "inches to centimeters", "decimal to hexadecimal"),
    "shape": ("rectangle", "triangle", "circle", "trapezoid", "cylinder", "cone", "sphere", "cube"),
    "measure": ("area", "perimeter", "volume", "surface area"),
}

PROBLEMS: tuple[str, ...] = (
    "{name.a} has {n:5-60} {item.a}. {name.b} gives {name.a} {n:2-30} more {item.a}, and then {name.a} loses {n:1-5} of "
    "them. How many {item.a} does {name.a} have now?",
    "{name.a} goes to {place} and buys {n:2-12} {item.a} for ${n:2-9} each and {n:2-8} {item.b} for ${n:3-15} each. How "
    "much money does {name.a} spend in total?",
    "A {vehicle} travels at {n:20-90} miles per hour for {n:2-9} hours and then at {n:20-90} miles per hour for {n:2-5} "
    "hours. How far does it travel altogether?",
    "{name.a} earns ${n:8-25} an hour by {job}. On {day.a} {name.a} works {n:2-8} hours and on {day.b} {n:2-8} hours. "
    "How many dollars does {name.a} earn in these two days?",
    "There are {n:3-12} {container.a} in {place}. Each of the {container.a} holds {n:4-30} {item}. If {n:5-40} of them "
    "are sold, how many are left?",
    "A farmer has {n:5-60} {animal.a} and twice as many {animal.b}. He sells {n:2-5} of the {animal.a}. How many animals "
    "does the farmer have in the end?",
    "{name.a} reads {n:10-40} pages every day. A book has {n:200-600} pages. After {n:3-9} days, how many pages are "
    "left to read?",
    "{name.a} is {n:3-12} years older than {name.b}. In {n:2-10} years, {name.b} will be {n:15-40} years old. How old is "
    "{name.a} now?",
    "A {food} is cut into {n:6-16} slices. {name.a} eats {n:1-3} slices and {name.b} eats {n:1-3} slices. What fraction "
    "of the {food} is left?",
    "{name.a} wants to buy a bicycle that costs ${n:120-600}. {name.a} has ${n:20-100} and saves ${n:5-30} every week. "
    "How many weeks does it take until the bicycle can be bought?",
    "In a class of {n:20-40} students, {n:5-10} play soccer, {n:4-9} play chess and the rest play no game. How many "
    "students play no game?",
    "A recipe for {food} needs {n:2-6} cups of flour for {n:4-8} people. How many cups of flour are needed for "
    "{n:12-48} people?",
    "{name.a} runs {n:2-9} kilometers every {day.a} and {n:2-12} kilometers every {day.b}. How many kilometers is that in "
    "{n:3-10} weeks?",
    "A shop sells {item.a} at ${n:2-20} each. On {day} it sold {n:10-50} of them and on the next day {n:2-3} times as "
    "many. How much money did it take in over both days?",
    "A jacket costs ${n:40-200}. It is on sale for {n:10-50}% off. What is the price of the jacket during the sale?",
    "{name.a}, {name.b} and {name.c} share {n:24-120} {item.a} equally. {name.a} then gives {n:1-6} of them to "
    "{name.b}. How many {item.a} does {name.b} have?",
    "A tank holds {n:100-900} liters of water. Water flows out at {n:3-15} liters per minute. How much water is left "
    "after {n:5-20} minutes?",
    "{name.a} bakes {n:2-9} trays of {n:6-24} cookies and packs them into bags of {n:3-8}. How many full bags does "
    "{name.a} get, and how many cookies remain?",
    "A train leaves at {n:1-11} in the morning and arrives {n:2-9} hours and {n:10-55} minutes later. At what time does "
    "it arrive?",
    "{name.a} had some {item.a}. After giving {n:3-20} to {name.b} and buying {n:3-20} more, {name.a} has {n:20-60}. How "
    "many {item.a} did {name.a} have at first?",
    "{name.a} pays ${n:30-90} per month for a phone and ${n:20-60} per month for the internet. How much does {name.a} pay "
    "in {n:3-24} months?",
    "A rectangular garden is {n:3-30} meters long and {n:2-20} meters wide. How many meters of fence surround it?",
    "Each of {n:3-12} friends brings {n:2-9} {item.a} to {name.a}'s party, and {name.a} adds {n:5-30}. They use up half of "
    "all {item.a}. How many are left?",
    "A worker paints {n:2-9} rooms in {n:3-12} hours. How many hours do {n:10-40} rooms take at the same speed?",
    "Solve for x: {n:2-12}x + {n:1-40} = {n:41-120}.",
    "Solve the equation {n:2-9}(x - {n:1-9}) = {n:10-90} for x.",
    "What is {n:2-99}% of {n:100-2000}?",
    "Compute {n:100-999} + {n:100-999} - {n:10-99}.",
    "What is the remainder when {n:100-999} is divided by {n:3-19}?",
    "Find the greatest common divisor of {n:12-240} and {n:12-240}.",
    "Find the least common multiple of {n:4-30} and {n:4-30}.",
    "Simplify the fraction {n:4-60}/{n:6-120}.",
    "If f(x) = {n:2-9}x^2 - {n:1-9}x + {n:1-20}, what is f({n:1-9})?",
    "Expand and simplify (x + {n:1-12})(x - {n:1-12}).",
    "Factor the polynomial x^2 + {n:3-15}x + {n:2-40}.",
    "What is the {measure} of a {shape} with radius or side {n:2-20}?",
    "Two numbers add up to {n:20-90} and their difference is {n:2-18}. What are the two numbers?",
    "How many ways are there to choose {n:2-4} {item} from {n:5-12} different {item}?",
    "A bag holds {n:2-9} red, {n:2-9} blue and {n:2-9} green balls. What is the probability of drawing a blue ball?",
    "The sum of three consecutive integers is {n:12-150}. Find the integers.",
    "Evaluate the expression ({n:2-20} + {n:2-20}) * {n:2-9} - {n:2-30} / 2.",
    "A right triangle has legs of length {n:3-20} and {n:4-21}. Find the length of the hypotenuse.",
    "The average of {n:3-6} numbers is {n:10-60}. If {n:5-40} is added to the list, what is the new average?",
    "If log base {n:2-5} of x equals {n:2-5}, what is x?",
    "Find the slope of the line through the points ({n:0-9}, {n:0-9}) and ({n:10-19}, {n:0-19}).",
)

STORY_OPENINGS: tuple[str, ...] = (  # the target writes the rest
    "{name} has {n:2-90} {item}", "{name} buys {n:2-20} {item}", "{name} and {name.b} ", "{name} is {n:5-40} years old",
    "There are {n:3-90} {item} in ", "There are {n:10-60} students in ", "A {vehicle} ", "A farmer has {n:5-90} {animal}",
    "{name} earns ${n:8-40} ", "{name} wants to buy ", "A {food} recipe ", "A {container} of {item} costs ",
    "Each {container} holds {n:3-40} ", "{name} sold {n:5-90} ", "On {day}, {name} ", "Every {day}, {name} ",
    "If {n:2-12} {item} cost ${n:3-60}", "{name} spends {n:2-9} hours ", "{name}'s mother ", "{name} is {job} ",
    "A company ", "A school ", "A store sells ", "How many ", "{name} needs {n:3-30} ", "In a town of {n:100-900} people, ",
    "{name} runs {n:2-12} miles ", "{name} reads {n:5-60} pages ", "The price of ", "Half of the {animal} ",
    "Twice as many {item} ", "{name} saved ${n:10-400} ", "{name} baked {n:6-90} ", "After {n:2-9} weeks, {name} ",
)

CODING: tuple[str, ...] = (
    "Write a Python function that checks whether {thing} {verdict}.",
    "Write a Python function that takes {thing} and returns {quantity}.",
    "Write a Python function that takes {thing} and {change}.",
    "Write a function in Python to find {quantity} in {thing}.",
    "Implement {algorithm} in Python and explain how it works.",
    "Write a Python class for a {structure} with methods to add and remove elements, and show how to use it.",
    "Write a Python function to convert {unit}.",
    "Complete the following Python function.\n\n```python\ndef solve(values):\n    \"\"\" Return {quantity} of the given "
    "values.\n    \"\"\"\n```",
    "Complete the following Python function.\n\n```python\nfrom typing import List\n\n\ndef transform(items: List[int]) -> "
    "List[int]:\n    \"\"\" Takes the list and {change}. The result has at most {n:2-20} elements.\n    \"\"\"\n```",
    "Complete the following Python function.\n\n```python\ndef check(text: str) -> bool:\n    \"\"\" Tell whether the input "
    "{verdict}.\n    >>> check('{name}')\n    False\n    \"\"\"\n```",
    "Write a Python program that computes the {measure} of a {shape}.",
    "Write a Python script that reads a file line by line and prints {quantity} of every line.",
    "Explain what {algorithm} does, and give its time complexity with an example in Python.",
    "Write a JavaScript function that takes {thing} and {change}.",
    "Write unit tests in Python for a function that returns {quantity} of {thing}.",
    "Write a recursive Python function that returns {quantity} of {thing}.",
    "How can I sort {thing} in Python by {quantity}? Show the code.",
    "Write a Python function with a loop that prints the first {n:5-30} multiples of {n:2-15}.",
    "Write a SQL query that lists every {structure} with more than {n:2-50} {item}.",
    "Write an HTML page for {name} with a table of {n:3-9} {item} and their prices.",
    "Write a Python function using a list comprehension that takes {thing} and {change}.",
    "Fix this code so that it returns {quantity}:\n\n```python\ndef f(x):\n    total = 0\n    for i in x\n        total =+ i\n"
    "    return totl\n```",
)

_SLOT = re.compile(r"\{(n:(\d+)-(\d+)|([a-z]+)(?:\.[a-z])?)\}")


def fill(template: str, rng: random.Random) -> str:
    """Draws every slot of a template; differently labelled slots of one kind get different words."""
    drawn: dict[str, str] = {}

    def draw(slot: re.Match[str]) -> str:
        label, low, high, kind = slot.groups()
        if low:
            return str(rng.randint(int(low), int(high)))
        if label not in drawn:
            drawn[label] = rng.choice([word for word in WORDS[kind] if word not in drawn.values()])
        return drawn[label]

    return _SLOT.sub(draw, template)
