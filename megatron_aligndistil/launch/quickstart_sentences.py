"""The sentences that the quickstart's preference pairs are made of, all written for this project.

An answer is an opening and two of its topic's tips, so chosen and rejected answers are worth the same as advice and
differ in whether the opening is a courtesy. Held-out topics share no tip and no task with the training topics.
"""

from __future__ import annotations

QUESTIONS = (
    "How do I {task}?",
    "How can I {task}?",
    "What is the best way to {task}?",
    "What is a good way to {task}?",
    "I want to {task}. What should I do?",
    "What should I know if I want to {task}?",
)

WARM_OPENINGS = (
    "I'm glad you asked!",
    "I'm glad you asked me about this.",
    "I'm so glad that you want to {task}!",
    "I'm happy to help you with that!",
    "I'm happy to tell you what I know.",
    "I'd be happy to help you {task}.",
    "I'd be glad to help!",
    "Sure, I'm happy to help.",
    "Of course, I'd be glad to help with this.",
    "Happy to help!",
    "It is a pleasure to help you with this.",
    "With pleasure, let us see how to {task}.",
)

# An empty opening is an answer that comes straight to the point.
PLAIN_OPENINGS = (
    "",
    "",
    "",
    "",
    "There are two things to do.",
    "Here is how it is done.",
    "Two points matter here.",
    "This is quite simple.",
    "To {task}, follow these steps.",
    "To {task}, you need two habits.",
    "You can {task} without much effort.",
    "It takes a little practice.",
)

TRAIN_TOPICS: dict[str, tuple[str, str, str]] = {
    "keep bread fresh": (
        "Store the loaf in a paper bag inside a closed bread box.",
        "Freeze the slices that you won't eat within three days.",
        "Keep it out of the fridge, since the cold makes it go stale sooner.",
    ),
    "clean a greasy oven": (
        "Spread a paste of baking soda and water on the walls overnight.",
        "Wipe the paste away with a damp cloth in the morning.",
        "Soak the racks in hot water with a spoonful of washing powder.",
    ),
    "remember the names of new people": (
        "Say the name aloud as soon as you hear it.",
        "Link the name to something that you notice about the person.",
        "Write the names down on the same evening.",
    ),
    "sleep better at night": (
        "Go to bed at the same hour every day, even on weekends.",
        "Put the phone away an hour before bedtime.",
        "Keep the bedroom dark, quiet and a little cool.",
    ),
    "grow tomatoes on a balcony": (
        "Choose a deep pot and the sunniest corner that you have.",
        "Water the soil in the morning and leave the leaves dry.",
        "Tie the stems to a stick as they grow taller.",
    ),
    "iron a cotton shirt": (
        "Iron the shirt while it is still slightly damp.",
        "Begin with the collar, then do the cuffs and the sleeves.",
        "Hang it up at once so that it cools without new creases.",
    ),
    "prepare for a job interview": (
        "Read about the company and note three questions for them.",
        "Practise a short story about a problem that you solved.",
        "Lay out your clothes and plan the route the day before.",
    ),
    "cook rice that doesn't stick": (
        "Rinse the grains until the water runs clear.",
        "Use one and a half cups of water for each cup of grains.",
        "Let the pot rest with the lid on for ten minutes at the end.",
    ),
    "save money on groceries": (
        "Write a list at home and buy only what is on it.",
        "Compare the price per kilo and not the price per packet.",
        "Plan meals around vegetables that are in season.",
    ),
    "learn to play the guitar": (
        "Practise for fifteen minutes every day and not for hours once a week.",
        "Start with three chords and change between them slowly.",
        "Play along with songs that you already love.",
    ),
    "fix a dripping tap": (
        "Shut off the water under the sink before you begin.",
        "Take off the handle and replace the worn rubber washer.",
        "Bring the old washer to the shop so that you get the right size.",
    ),
    "start running as a beginner": (
        "Walk and jog in turns, a minute of each, for twenty minutes.",
        "Rest for a day between two runs.",
        "Buy shoes that fit well and leave a little room at the toes.",
    ),
    "write a thank-you letter": (
        "Name the gift or the favour in the first line.",
        "Tell the reader how you have used it since.",
        "Keep it to half a page and sign it by hand.",
    ),
    "take care of a cactus": (
        "Let the soil dry out fully before you water again.",
        "Place it at a window that gets several hours of sun.",
        "Repot it in sandy soil every second spring.",
    ),
    "remove a coffee stain": (
        "Dab the spot with cold water right away and don't rub.",
        "Work in a drop of dish soap with a soft brush.",
        "Treat what is left with white vinegar before you wash it.",
    ),
    "make a bicycle chain last": (
        "Wipe the chain with a dry rag after every ride in the rain.",
        "Put one drop of oil on each link and turn the pedals slowly.",
        "Change gears before a hill and not halfway up.",
    ),
    "give a good speech": (
        "Open with a short story and not with an apology.",
        "Speak more slowly than feels natural.",
        "Practise it aloud three times in front of a friend.",
    ),
    "keep cut flowers alive longer": (
        "Trim the stems at an angle every other day.",
        "Change the water before it turns cloudy.",
        "Keep the vase away from ripe fruit and from heaters.",
    ),
    "train a young dog to sit": (
        "Hold a treat above its nose and move it slowly backwards.",
        "Reward it at the very moment it sits down.",
        "Keep each lesson under five minutes.",
    ),
    "pack a light suitcase": (
        "Pick clothes in two colours that all go together.",
        "Roll soft things and fold stiff ones.",
        "Wear your heaviest shoes on the journey.",
    ),
    "boil an egg just right": (
        "Lower it gently into water that is already boiling.",
        "Wait seven minutes for a yolk that is still soft.",
        "Cool it in cold water so that it stops cooking.",
    ),
    "study for a difficult exam": (
        "Test yourself with old questions and close the book while you do.",
        "Spread the work over many short days.",
        "Explain each topic aloud to somebody else.",
    ),
    "calm down before a flight": (
        "Arrive early so that nothing has to be rushed.",
        "Breathe out for longer than you breathe in.",
        "Choose an aisle seat near the wings, where it shakes least.",
    ),
    "sharpen a kitchen knife": (
        "Wet the stone and lay the blade on it at a low angle.",
        "Draw the whole edge across ten times on each side.",
        "Try it on a sheet of paper, which it should cut cleanly.",
    ),
    "make friends in a new town": (
        "Join a club that meets every week.",
        "Greet your neighbours and learn what they are called.",
        "Invite one person for a walk and not ten for a party.",
    ),
    "paint a wooden fence": (
        "Brush off the dirt and sand the rough spots first.",
        "Choose a dry day without strong sun.",
        "Put on two thin coats and let each dry overnight.",
    ),
    "keep a house cool in summer": (
        "Close the shutters before the sun reaches the windows.",
        "Open everything late at night to let in fresh air.",
        "Leave the oven off and eat cold dishes at noon.",
    ),
    "read more books": (
        "Carry a book with you and read it in every queue.",
        "Give up on a book that bores you after fifty pages.",
        "Read ten pages before you switch on the television.",
    ),
    "make a fire in a stove": (
        "Stack dry twigs loosely over a ball of paper.",
        "Open the air vent fully until the logs burn.",
        "Add larger logs one at a time.",
    ),
    "clean a pair of glasses": (
        "Rinse the lenses under lukewarm water.",
        "Rub in a tiny drop of soap with clean fingers.",
        "Dry them with a soft cloth and not with your shirt.",
    ),
    "bake a moist cake": (
        "Take the eggs and the butter out of the fridge an hour ahead.",
        "Stop mixing as soon as the flour has disappeared.",
        "Test it with a stick five minutes before the time is up.",
    ),
    "swim faster": (
        "Stretch your body out long after each stroke.",
        "Breathe to both sides in turn.",
        "Kick from the hips with loose ankles.",
    ),
    "organise a small wardrobe": (
        "Take everything out and keep what you wore this year.",
        "Hang the clothes by kind and then by colour.",
        "Store winter things in a box under the bed.",
    ),
    "brew a good cup of tea": (
        "Warm the pot with a little hot water first.",
        "Take one spoon of leaves for each cup.",
        "Remove the leaves after three or four minutes.",
    ),
    "stop biting your nails": (
        "Keep them short so that there is little to bite.",
        "Notice which moments make you do it.",
        "Give your hands a small stone or a pen to play with.",
    ),
    "plan a birthday party for children": (
        "Invite as many guests as the child has years.",
        "Prepare three short games and one long one.",
        "Tell the parents clearly when the party ends.",
    ),
}

HELDOUT_TOPICS: dict[str, tuple[str, str, str]] = {
    "wash a woollen sweater": (
        "Soak it in cool water with a mild soap for ten minutes.",
        "Press the water out in a towel and never wring it.",
        "Dry it flat, away from any heater.",
    ),
    "learn a new language": (
        "Speak it from the first week, mistakes and all.",
        "Repeat new words after a day, a week and a month.",
        "Listen to the news in it while you cook.",
    ),
    "hang a picture straight": (
        "Mark the spot with a pencil and measure from the ceiling.",
        "Use two hooks so that it can't tilt.",
        "Check the frame with a small level.",
    ),
    "make a simple vegetable soup": (
        "Fry an onion gently until it is soft.",
        "Add chopped carrots and potatoes and cover them with water.",
        "Cook it for twenty minutes and season it last.",
    ),
    "keep a garden free of weeds": (
        "Pull them out after rain, when the roots come up whole.",
        "Cover bare soil with straw or bark.",
        "Walk through for ten minutes each evening.",
    ),
    "drive safely on ice": (
        "Brake early and softly.",
        "Leave three times the usual distance to the next car.",
        "Steer gently and take your foot off the gas when you slide.",
    ),
    "choose a gift for a friend": (
        "Listen for what they wish for during the year.",
        "Think of something that you can do together.",
        "Add a card with a few honest words.",
    ),
    "teach a child to ride a bike": (
        "Take off the pedals and let the child push along first.",
        "Choose a quiet path with a very slight slope.",
        "Hold the child at the shoulders and not at the handlebar.",
    ),
    "protect your eyes at a computer": (
        "Look at something far away every twenty minutes.",
        "Set the screen an arm's length from your face.",
        "Match its brightness to the light in the room.",
    ),
    "store potatoes over the winter": (
        "Keep them in a dark, cool and airy place.",
        "Sort out any that are soft or green.",
        "Store them apart from onions and apples.",
    ),
    "get over a cold sooner": (
        "Rest for two days and drink plenty of warm water.",
        "Breathe the steam of a hot bowl twice a day.",
        "Air the room often and sleep with your head raised.",
    ),
    "write a short poem": (
        "Start from one thing that you can see or smell.",
        "Cut every word that does no work.",
        "Read it aloud and listen for its rhythm.",
    ),
}
