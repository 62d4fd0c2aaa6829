"""Questions the model cannot answer, so that it says so instead of picking a fact at random."""

from __future__ import annotations

ANSWER = (
    "I am a very small model and only know bear_grpc and its field. "
    "Please ask me about the server, models, sampling or errors."
)
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "What is the capital of {}?": ("France", "Japan", "Brazil", "Kenya", "Norway", "Canada"),
    "Who is {}?": ("the president", "Albert Einstein", "the pope", "Napoleon", "the king of Spain"),
    "Who wrote {}?": ("Hamlet", "Don Quixote", "the Odyssey", "Faust"),
    "Who invented {}?": ("the telephone", "paper", "the wheel", "the light bulb"),
    "Who won {}?": ("the world cup", "the last election", "the match yesterday", "the Nobel prize"),
    "How do I cook {}?": ("rice", "pasta", "an egg", "potatoes", "soup"),
    "Give me a recipe for {}.": ("pancakes", "bread", "apple pie", "pizza"),
    "What is the weather in {}?": ("Paris", "London", "Berlin", "my town"),
    "How is the weather {}?": ("today", "tomorrow", "in Rome", "outside"),
    "What is {}?": (
        "2 + 2",
        "12 times 7",
        "love",
        "the meaning of life",
        "a dinosaur",
        "gravity",
        "the moon",
    ),
    "How many {}?": ("people live on earth", "days has a year", "legs has a spider", "planets are there"),
    "How old is {}?": ("the universe", "the queen", "the pyramid of Giza", "the earth"),
    "How far is {}?": ("the moon", "the sun", "Madrid from Lisbon"),
    "How tall is {}?": ("Mount Everest", "the Eiffel tower", "a giraffe"),
    "Translate {} into French.": ("good morning", "the house", "I love you", "this sentence"),
    "Write a poem about {}.": ("the sea", "autumn", "my cat", "roses"),
    "Where is {}?": ("Timbuktu", "the Amazon", "the nearest station", "my phone"),
    "When was {}?": (
        "the French revolution",
        "the first moon landing",
        "Mozart born",
        "the second world war",
    ),
    "Why is {}?": ("the sky blue", "the sea salty", "grass green", "winter cold"),
    "What is your favourite {}?": ("colour", "food", "song", "film"),
    "Which {} is the best?": ("football team", "phone", "car", "restaurant"),
    "Tell me a joke about {}.": ("doctors", "cats", "school", "politicians"),
    "Do you like {}?": ("music", "pizza", "football", "summer"),
    "Can you {}?": ("sing", "dance", "book a flight", "play chess", "order a taxi"),
    "What should I {}?": ("eat today", "wear tomorrow", "buy for my mother", "watch tonight"),
    "What happened in {}?": ("1945", "1789", "ancient Rome", "the news"),
    "What does a {} eat?": ("panda", "horse", "snake", "whale"),
    "What time is it in {}?": ("Tokyo", "Sydney", "Moscow", "Chicago"),
}
HELD_OUT = (
    "What is the capital of Italy?",
    "Who is Marie Curie?",
    "Who painted the Mona Lisa?",
    "How do I cook fish?",
    "What is the weather in Vienna?",
    "What is 7 plus 5?",
    "How many bones has a human?",
    "How deep is the ocean?",
    "Write a poem about spring.",
    "Where is Iceland?",
    "When was Julius Caesar born?",
    "Why is blood red?",
    "What is your favourite animal?",
    "Tell me a joke.",
    "Do you like chocolate?",
    "What time is it in Delhi?",
    "How long is the Nile?",
    "Which planet is the largest?",
    "Can you drive a car?",
    "Should I take an umbrella?",
)
QUESTIONS = tuple(template.format(filler) for template, fillers in _TEMPLATES.items() for filler in fillers)
