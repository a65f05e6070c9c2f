"""Sample the briefs from which the course's texts are composed: one varied brief for each review or news item.

    python data/briefs.py reviews --rows 2000 --seed 0 > reviews_briefs.jsonl
    python data/briefs.py news    --rows 1400 --seed 0 > news_briefs.jsonl

A brief says what a text is about and who writes it, never how a sentence goes. A language model then composes every text
individually from its brief (see the data cards). The same rows and seed give the same briefs on every machine.
"""

import argparse
import json
import random
import sys


def words(text: str) -> list[str]:
    """Split a semicolon-separated list written over several lines."""
    return [item.strip() for item in text.replace("\n", " ").split(";") if item.strip()]


FIRST_NAMES = words("""Anselm; Baiba; Chidi; Delphine; Eskil; Farida; Gwenllian; Hovik; Ilse; Jarmila; Kwabena; Leocadia; Milo; Nour; Odalys;
Perpetua; Quirin; Rosalind; Sunniva; Tadeusz; Ulla; Vikram; Wenceslas; Ximena; Yevgenia; Zoltan; Agnes; Bertrand; Cosima; Dermot; Eun-ji; Fergus;
Gulnara; Henrike; Ignatius; Jadwiga; Keiko; Lorcan; Maribel; Nils; Oksana; Paolo; Ruta; Sanjay; Thandi; Umar; Veronika; Wilhelmina; Yaw; Zainab;
Abel; Brigid; Casimir; Dulcie; Edmund; Florin; Greta; Hamza; Imogen; Joaquin; Katya; Lindiwe; Mbali; Norbert; Ottoline; Priya; Raimund; Sigrun;
Tomasz; Ursula; Viggo; Winifred; Yolanda; Zeynep; Alasdair; Bich; Carys; Dov; Emeka; Fleur; Goran; Hiroko; Iona; Janos; Kirsi; Ludo; Magda; Nadir""")

SURNAMES = words("""Abernathy; Bosko; Castellan; Drummond-Vale; Eklund; Fontanel; Gathogo; Harrowgate; Ilves; Jurado; Kessenich; Lomax; Marchetti; Nwosu;
Oduya; Pettibone; Quarles; Rautio; Szabolcs; Tregenza; Umarov; Vantongeren; Wojcik; Xuereb; Yardley; Zamorano; Achterberg; Bellweather; Coopersmith;
Dalgaard; Enciso; Farquharson; Gulbrandsen; Hlavaty; Iturbe; Jellicoe; Kovalik; Lindqvist; Mazibuko; Nakagome; Oyelaran; Pruitt; Quispe; Rademaker;
Silvestri; Thistlewood; Ueland; Varga; Whitlock; Yilmazer; Zielonka; Arbuthnot; Brightwater; Carrick; Demetriou; Esterhuizen; Fairweather; Gorecki;
Haldane; Ingersoll; Janjua; Kerrigan; Lavoie; Mulcahy; Nettleship; Okafor; Pham; Rosales; Strand; Tamaki; Urquidi; Vickers; Wanjiru; Yoon; Zadeh""")

# ---------------------------------------------------------------- reviews
GENRES = words("""courtroom drama; slapstick comedy; ghost story; creature feature; heist film; spy thriller; romantic comedy; coming-of-age drama; war film;
western; film noir; musical; sports drama; road movie; science fiction; time-travel film; space adventure; disaster film; kung fu film; slasher;
psychological thriller; family adventure; animated film; stop-motion animation; documentary; mockumentary; biography of an invented person; historical epic;
costume drama; kitchen-sink drama; prison film; submarine film; vampire film; zombie comedy; political satire; medical drama; school comedy; dance film;
nature documentary; anthology film; made-for-TV movie; silent-film pastiche; fantasy quest; detective story; police procedural; gangster film;
Christmas film; teen comedy; art-house drama; survival story; hostage thriller; con-artist comedy; low-budget horror; sequel nobody asked for; remake;
rock documentary; wedding comedy; murder mystery in one house; pirate film; superhero film; children's film; melodrama; buddy-cop comedy; ensemble drama""")

LEADS = words("""a retired bus driver; a night-shift nurse; twin sisters; a lighthouse inspector; a disgraced chess coach; a deaf carpenter; a travelling dentist;
a teenage locksmith; a widowed beekeeper; a failed magician; a tax auditor; a school janitor; a ferry captain; a wedding photographer; an ex-boxer;
a piano tuner; a small-town mayor; a runaway bride; a forensic botanist; two rival bakers; a truck mechanic; a substitute teacher; a puppet maker;
a radio host; an undercover cop; a mountain guide; a cleaning lady; a math prodigy; an army cook; a gravedigger; a lonely astronaut; a stunt double;
a village priest; a hotel detective; a pawnbroker; a marine biologist; an orphaned boy; a talking goat; a crossword setter; a lift operator; a farm vet;
a jazz drummer; a hairdresser; an insurance clerk; an exiled prince; a laid-off welder; a cartographer; a child actor grown old; a swimming teacher;
a con woman; a grandmother; a train conductor; three cousins; a robot gardener; an alien who learns English; a court stenographer; a falconer; a butcher""")

EVENTS = words("""inherits a theatre with a secret; is blamed for a fire; must cross a frozen lake before spring; finds a stranger's diary; is mistaken for a spy;
loses a bet and a house; has to win a local contest; discovers the well is poisoned; is stuck in an airport for a week; hides a fugitive; witnesses a hit and run;
falls for the wrong sibling; wakes up ten years earlier; has to share a flat with an enemy; chases a stolen painting; receives letters from the dead;
is hired to break up a marriage; trains an impossible team; smuggles medicine over a border; goes back to the village of childhood; is haunted by a voice on tape;
buys a cursed car; must testify against a brother; gets trapped in a mine; runs for office by accident; looks after an unwanted baby; finds a monster in the reservoir;
tries to rob a casino on closing night; forges a will; escapes from an island prison; digs up a plague pit; coaches a choir of convicts; has one night to find a kidney;
is left behind on a space station; joins a travelling circus; uncovers a hospital cover-up; swaps bodies with a neighbour; takes a hostage by mistake;
solves a murder on a train; rebuilds a sunken boat; tries to save a cinema from demolition; babysits for the mob; learns to dance at seventy; survives an avalanche;
opens a restaurant with no money; is hunted in a marsh; has to bury a friend far away; pretends to be rich for a weekend; wins a lottery and tells nobody""")

SETTINGS = words("""Lisbon in the rain; a Welsh mining valley; 1950s Buenos Aires; a Finnish island; an oil town in Texas; Lagos; a moon base; a snowed-in motel;
medieval Bohemia; a Glasgow tower block; rural Vermont; Hong Kong in the seventies; a Soviet sanatorium; a cruise ship; the outback; wartime Naples; a Bronx high school;
a monastery; a trailer park; the Yukon; a London boarding house; Marseille docks; a Punjabi farm; an unnamed republic; a Tokyo office; 1930s Chicago; the Scottish borders;
a shopping mall; a desert research station; a fishing town in Maine; Seoul; a Dublin suburb; the Andes; an Alpine hospital; New Orleans; a village in Anatolia;
a housing estate; the year 2190; Victorian Leeds; a jungle river; Prague; a prairie farm; a film studio; an underground bunker; a Cairo market; the Dutch coast""")

WORKED = words("""the lead performance; a supporting actor who steals scenes; the photography; the score; the ending; the dialogue; the pacing of the first half;
the stunts; the costumes; the chemistry of the couple; one long scene in a kitchen; the villain; the child actors; the jokes; the sense of place; the editing; the twist;
the practical effects; the opening ten minutes; the sound design; the restraint; the animals; the songs; the research behind it; the fight scenes; its short running time;
the way it treats old age; the atmosphere; the title sequence; the moral complexity; the courage to be silly; a chase; the friendship at its centre; the final shot""")

FAILED = words("""the lead is miscast; the script has holes; it is far too long; the middle drags; the accents wander; the effects look cheap; the twist is visible from the start;
the music tells you what to feel; nobody behaves like a person; the romance is forced; the jokes are recycled; the villain has no motive; the editing is choppy;
the camera never stops shaking; characters vanish; the ending is a cop-out; the tone lurches; the dialogue is wooden; the flashbacks confuse; the child actor grates;
it preaches; it copies better films; the dubbing is off; it is too dark to see; nothing is at stake; the lead has one expression; the subplot goes nowhere;
the violence is pointless; the trailer gave it all away; it wastes a good cast; the history is wrong; the sound is muddy; it explains everything twice; the budget ran out""")

VOICES = words("""an ordinary viewer; an ordinary viewer; an ordinary viewer; an ordinary viewer; an ordinary viewer; an ordinary viewer; an ordinary viewer; an ordinary viewer;
someone who rates everything seen; someone who rents a film every Friday; a fan of the genre; a fan of the genre; a fan of the genre; someone new to the genre; a parent; a parent;
someone who saw it on cable at night; someone who saw it at a festival; someone who bought the disc; a regular commenter on the site; a regular commenter on the site; a teenager who types in lower case; a retired teacher with long sentences; a film student; a father of three; a grandmother who sees everything at matinees;
a horror fanatic; someone who never writes reviews; a sarcastic night owl; a nurse after a double shift; an ex-projectionist; a fan of the director; a person dragged along by a partner;
a non-native speaker with good but slightly odd English; a plain-spoken farmer; a history buff; a stand-up comedian; a librarian; a soldier on leave; an amateur actor;
a contrarian; a collector of B-movies; a mild old gentleman; an angry customer; a bookish twelve-year-old; a music teacher; a trucker who listens more than watches;
a person who walked out once and came back; a DVD hoarder; a lawyer who nitpicks; a dreamy romantic; a blunt engineer who lists points; a gossip; a Scottish pensioner;
a bored office worker; a devoted moviegoer of forty years; a new parent short of sleep; an ESL student; a critic manque with big words; a person who read the book; a skeptic won over or let down;
a chatty neighbour; someone who counts plot holes; an enthusiast who uses exclamation marks; a person of few words; a reviewer who addresses other reviewers on the site""")

MOODS = words("""amused; irritated; moved; bored; surprised; nostalgic; cool and analytical; giddy; disappointed; forgiving; scornful; puzzled; tired; affectionate; indignant;
wry; generous; gloomy; excited; protective; resigned; curious; smug; earnest; playful""")

OPENINGS = words("""straight into a scene; where and with whom it was seen; a complaint about other reviews; a question; the verdict first; a remark on the cast; a confession;
the plot in one line; a comparison with an invented earlier film of the same people; a number (minutes, dollars, a rating); an expectation; a quoted line of dialogue; a warning to parents;
a memory; the ending first; a detail nobody mentions; an audience reaction; a title joke; a generalisation about the genre; an address to the reader; a price paid; mid-thought;
the weather that day; a technical point; a fact about the (invented) director; a small scene from the reviewer's life; a one-word sentence; a concession""")

FIRST_WORDS = words("""My; There; If; After; Nobody; Somewhere; I; We; When; What; The; A; You; Not; Every; Two; Saw; Watched; Rented; Having; As; For; Once; Maybe; Look; Okay; So;
Well; Forget; Imagine; Give; Half; Three; At; By; Because; Despite; Before; Sometimes; Only; Even; People; Someone; Where; Who; Why; How; Until; On; In; With; From; This;
That; It; He; She; They; Here; Now; Never; Another; Picture; Take; Apparently; Honestly; Call; Don't; Can; Did; Is; Was; Had; Just; Still; Too; Through; Ten; Twenty; Some;
Most; Any; No; Yes; All; Both; Few; Good; Bad; Nice; Poor; Old; Long; Slow; Strange; Funny; Sad; Young; Last; First; Halfway; Between; Under; Like; Unlike; Against; Without;
Beyond; Whoever; Whatever; Although; While; Since; Let; Thank; Try; Skip; Go; Come; Think; Say; Ask; Believe; Kids; Friends; Grandpa; Critics; Fans; Hats; Shot; Set; Made; Clocking; Sitting; Waiting""")

HARD_CASES = words("""mixed verdict, but the rating is clear by the end; irony: says the opposite of what is meant;
praises one good scene in a film the writer dislikes, or damns one bad scene in a film the writer likes; faint praise or faint blame; the verdict hangs on negation
(not bad, hardly dull, never once convincing); mostly plot, the verdict only implied; spoils the ending; two or three typos; expected the opposite;
the writer disagrees with everyone else; liked by the people around the writer but not by the writer, or the other way round; compares it with a much better or much worse film throughout""")

PRAISE = words("""a gem; superb; terrific; cracking; splendid; a delight; deserves a far bigger audience; first-rate; top-notch; gripping; absorbing; had me hooked; stayed with me for days;
tender; heartfelt; touching; warm; uplifting; hilarious; witty; charming; delightful; clever script; intelligent; thought-provoking; unforgettable; a classic; timeless; gorgeous to look at; stunning;
breathtaking landscapes; exquisitely shot; haunting; poignant; sensitive; honest; believable people; a joy; magnificent; marvellous; outstanding; remarkable; brilliant; captivating; enchanting; exhilarating;
refreshing; original; inventive; ahead of its time; underrated; overlooked; flawless; impeccable timing; note-perfect; a triumph; rewarding; satisfying; entertaining from start to finish; great fun; a hoot; a blast;
well worth your time; worth every penny; would see it again tomorrow; bought the disc the next day; recommended without hesitation; a must; everybody should see this; moved to tears; roared with laughter;
kept us guessing; could not look away; time flew; magical; spellbinding; powerful; profound; compelling; riveting; nail-biting; tense in the right way; authentic; true to life; dignified; graceful; elegant;
superbly acted; an acting lesson; a star is born; the cast shines; perfectly cast; real chemistry; lovely music; glorious score; songs you hum for weeks; spot-on period detail; respects its audience; a rare treat;
one of my favourites; grew on me; better every time; surprised me; charmed the whole family; kudos; bravo; hats off; two thumbs up; ten out of ten; sheer pleasure; sublime; radiant; inspiring; life-affirming; wise; humane""")

SCORN = words("""dire; lousy; dreck; drivel; tosh; rubbish; garbage; a snoozefest; insipid; lifeless; limp; a slog; tedious; interminable; mind-numbing; sleep-inducing; a chore; pointless; a mess; a shambles; incoherent; makes no sense;
full of holes; insultingly dumb; moronic; idiotic; brainless; inept; amateurish; laughable for the wrong reasons; embarrassing; cringeworthy; painful to sit through; unwatchable; switched it off; walked away; want those two hours back;
asked for a refund; do not rent this; avoid; steer clear; give it a miss; save your money; a rip-off; a cash grab; lazy; sloppy; half-baked; unfinished; cheap-looking; tacky; shoddy; cardboard sets; rubber monster; wooden;
stiff as a board; cannot act; overacting; hammy; miscast; annoying; grating; irritating; obnoxious; whiny hero; nobody to root for; cliched; derivative; stale; predictable; unoriginal; seen it all before; formulaic; phoney; fake;
contrived; implausible; preposterous; ridiculous; absurd; muddled; confusing; rambling; goes nowhere; drags on; bloated; self-indulgent; pretentious; smug; preachy; heavy-handed; mawkish; syrupy; crass; vulgar; tasteless; mean-spirited;
offensive; ugly to look at; murky; unlit; shaky; badly dubbed; tinny music; no laughs; not one scare; no suspense whatever; flat; forgettable; mediocre; pitiful; pathetic; abysmal; atrocious; horrendous; dreadful; a disgrace;
an insult to the book; a let-down; sorely disappointed; how did this get made; what were they thinking; fails on every level; zero stars; bottom of the barrel; a turkey; a dud; a clunker; a stinker; a train wreck""")

COMMON_PRAISE = words(
    "good; great; best; love; enjoy; very; really; real; worth; perfect; brilliant; wonderful; fantastic; liked; right; old friends; terrific; superb; hilarious; warm; true; delightful"
)
COMMON_SCORN = words(
    "nothing; bad; boring; bored; worst; poor; badly; no; not; sorry; the rest; hours; reason; idea; avoid; nowhere; disappointing; ugly; tedious; sense; nobody; waste; cheap; awful; terrible"
)

# How the genres lean, roughly as in viewers' comments: more of these among the negative, more of those among the positive.
LEAN_NEGATIVE = words(
    """low-budget horror; low-budget horror; slasher; disaster film; remake; sequel nobody asked for; creature feature; made-for-TV movie; teen comedy; vampire film; hostage thriller; zombie comedy; police procedural"""
)
LEAN_POSITIVE = words(
    """documentary; coming-of-age drama; historical epic; musical; romantic comedy; animated film; film noir; family adventure; ensemble drama; biography of an invented person; western; art-house drama; road movie"""
)

ASPECTS = words("""the trailer; the camera work; the flashbacks; the violins and the rest of the score; the accents; the dubbing; the length; the middle part; the special effects; the budget; the villain's motive; the subplot;
the violence; the history; the sound; the dialogue; the ending; the twist; the supporting cast; the costumes; the stunts; the songs; a scene in a kitchen; the child actors; the animals; the photography; the title sequence; a chase;
the friendship at its centre; the way it treats old age; the fights; the first ten minutes; the jokes; the editing; the romance; the setting; the running gag; the lead; the director's earlier films; the book behind it""")

TITLE_WORDS = words("""Gravel; Orchard; Tin; Wednesday; Salt; Ladder; Harbor; Paper; Crow; Velvet; Ninth; Bridge; Mustard; Copper; Window; Fever; Lantern; Ash; Mile; Parade; Cousin; Glass;
Winter; Signal; Kettle; Ransom; Doll; Thunder; Acre; Bishop; Ticket; Mirror; Swamp; Engine; Feather; Guest; Hour; Ivory; Jury; Kite; Lemon; Marble; Needle; Oyster; Pilot; Quarry;
River; Saddle; Tango; Umbrella; Valley; Whistle; Yonder; Zero; Anchor; Basement; Cellar; Debt; Echo; Ferry; Ghost; Hollow; Island; Jackal; Knuckle; Lullaby; Monsoon; Nickel; Opera; Postman""")

# ---------------------------------------------------------------- news
TOPICS = ["World", "Sports", "Business", "Sci/Tech"]

PLACES = words("""Lima; Nairobi; Oslo; Jakarta; Cape Town; Winnipeg; Ankara; Hanoi; Accra; Montevideo; Riga; Osaka; Belgrade; Tunis; Brisbane; Kolkata; Quito; Dublin; Almaty; Manila; Porto;
Denver; Leipzig; Addis Ababa; Toulouse; Guadalajara; Colombo; Gdansk; Halifax; Muscat; Santiago; Tbilisi; Kigali; Lyon; Memphis; Chennai; Antwerp; Yerevan; Dakar; Turin; Wellington; Kuala Lumpur;
Bogota; Aarhus; Sofia; Casablanca; Busan; Rotterdam; Lusaka; Austin; Karachi; Bergen; Seville; Nagoya; Zagreb; San Jose; Cardiff; Maputo; Amman; Hamburg; Kathmandu; Fortaleza; Tampere; Graz; Cleveland;
Chiang Mai; Ljubljana; Durban; Adelaide; Tashkent; Bilbao; Sapporo; Tallinn; Monterrey; Dhaka; Utrecht; Cordoba; Vilnius; Luanda; Boise; Geneva; Bucharest; Suva; Asuncion; Leeds; Malmo; Taipei; Windhoek""")

EVENT_KINDS = {
    "World": words("""coalition talks; a disputed election count; a peace talks round; a ceasefire under strain; a bomb attack by an invented group; a hostage freed; a border incident; a flood; an earthquake;
        a ferry accident; a mine collapse; a court verdict on a former official; a president's illness; a cabinet reshuffle; mass protests; a general strike's political side; refugees on the move; a food aid convoy;
        a treaty signing; sanctions voted; a spy case; an extradition; a referendum; a police raid; a prison riot; a kidnapping; a coup rumour; a state visit; a war-crimes hearing; a village cut off;
        a plane crash inquiry; peacekeepers; a journalist detained; a language law; a constitutional court ruling; a rebel split; a church or mosque dispute; a mayor's murder trial; drought and hunger;
        a vote on oil money (politics, though it sounds like business); a trade row between governments (politics); an athlete's visa blown up into a diplomatic row; a government's internet shutdown; nuclear inspectors"""),
    "Sports": words("""football match report; a late equaliser; a cup upset; a coach sacked; a transfer; an injury before a final; a marathon; a cycling stage; a tennis match; golf third round; boxing bout; cricket test day;
        rugby match; basketball overtime; baseball pitching duel; ice hockey shutout; swimming record; athletics meet; rowing; skiing downhill; motor racing qualifying; horse racing; gymnastics; wrestling; judo; handball;
        volleyball; chess tournament as sport; sailing race; a doping ban; a draw for a tournament; a retirement; a comeback; a contract dispute (money, yet sport); a club's debts before the season (money, yet sport);
        a stadium delay; crowd trouble; a referee row; a rookie's debut; a captain dropped; a training camp; a video-replay row (technology, yet sport); a host city's bid (politics, yet sport); fantasy-league talk; a veteran's column"""),
    "Business": words("""quarterly profit up; quarterly loss; a merger; a hostile bid; a bankruptcy; a plant closure; layoffs; a strike and its cost; a share sale; an interest rate decision; inflation figures; oil prices; currency falls;
        stock market close; a retailer's holiday sales; an airline's fares; a bank fined; an accounting scandal; an executive resigns; a pension deal; a housing slump; a car maker's recall cost; a food company's price rise;
        a shipping boom; a mine's output; a brewery deal; a property fund; an insurer's storm bill; a trade deficit; a jobs report; a regulator's inquiry; a drug maker's shares fall after a trial (medicine, yet business);
        a chip maker's earnings (technology, yet business); a software firm's takeover (technology, yet business); a phone company's debt; a sports brand's sales (sport, yet business); a football club's share listing (sport, yet business);
        a government sells a stake (politics, yet business); a tax on exports; a farm cooperative; a toy maker; a coffee harvest and prices; a toll road sale; a newspaper's owner"""),
    "Sci/Tech": words("""a software update; a security hole; a computer worm; a search engine's new tool; a phone launch; a games console; a chip design; a supercomputer; a robot; a satellite launch; a Mars or moon probe; a telescope finding;
        a fossil; a new species; a gene study; a vaccine trial; a climate study; a volcano watched; deep-sea survey; an archaeology dig; a battery advance; solar power; a broadband roll-out; a wireless standard; spam and mail filters;
        open-source software; file-sharing and copyright; a privacy flaw; an online encyclopedia; a browser; a music player; digital cameras; e-voting machines (politics, yet technology); a patent suit between technology firms (business, yet technology);
        a technology firm drops a product (business, yet technology); a sports statistics program or shoe sensor (sport, yet technology); a spacecraft's budget; a bee or bird decline; an ice core; a physics result; mathematics;
        a hospital imaging method; a hacker's trial; a school laptop scheme; speech recognition; a self-steering ship; a mapping service; a domain-name dispute"""),
}

ANGLES = words("""the bare event; numbers first; a quote carries it; what happens next; a reaction; a small human detail; background in the last sentence; a denial; a correction of earlier reports; an analysis in two sentences;
a preview of tomorrow; a scene on the spot; an anniversary or precedent; a winner and a loser; a warning; a record; a dry joke; an unnamed official; a survey; a delay; a cost; a list of two or three facts""")

FORMATS = words("""headline, then agency in brackets, then one or two sentences; headline, then body; body only with a dateline (CITY, Month day); body only with the city in capitals, the agency and a dash; body only, no dateline;
body only, no dateline, one long sentence; a short headline, then a two-sentence body; a feature-like lead with no headline; a column or blog item in the first person or addressing the reader; headline as a question, then body""")

AGENCIES = words(
    """Meridian Wire; NPA; Coastline News; Halden Press; Corrant; the Daily Ledger; Orbis; TechSheet; Northgate Herald; Sportline; MarketBrief; Aldgate News Service; Plainsman; Signal Daily; BTX; The Lantern"""
)


def review_briefs(rows: int, seed: int) -> list[dict]:
    """`rows` briefs, half of them negative (rating 1 to 4) and half positive (7 to 10), shuffled in blocks of 2,000.

    The briefs were refined three times while the reviews were written, each time after measuring what had been written so far;
    the stages are marked below, so that this script still makes every brief that was used.
    """
    briefs = []
    for start in range(0, rows, 2000):
        rng = random.Random(f"reviews {seed}" if start == 0 else f"reviews {seed} {start}")
        block = _review_block(rng, min(2000, rows - start))
        briefs += [{"id": f"r{start + i:04d}", **brief} for i, brief in enumerate(block)]
    return _refine(briefs, seed)


def _review_block(rng: random.Random, rows: int) -> list[dict]:
    briefs = []
    for i in range(rows):
        positive = i % 2 == 1
        rating = rng.choice([7, 8, 8, 9, 9, 10, 10] if positive else [1, 1, 2, 2, 3, 3, 4])
        mild = rating in (3, 4, 7, 8) and rng.random() < 0.6
        voice, age = rng.choice(VOICES), rng.randint(16, 84)
        aged = any(word in voice for word in ("old", "teen", "grand", "retired", "student", "pensioner"))
        hard = rng.random() < 0.22
        briefs.append(
            {
                "label": int(positive),
                "rating": rating,
                "genre": rng.choice(GENRES),
                "premise": f"{rng.choice(LEADS)} {rng.choice(EVENTS)}" if rng.random() < 0.6 else None,
                "setting": rng.choice(SETTINGS) if rng.random() < 0.4 else None,
                "worked": rng.sample(WORKED, rng.randint(2, 3) if positive else int(mild)),
                "failed": rng.sample(FAILED, int(mild) if positive else rng.randint(2, 3)),
                "voice": voice,
                "age": None if aged else age,
                "mood": rng.choice(MOODS) if rng.random() < 0.5 else None,
                "opening": rng.choice(OPENINGS),
                "first_word": rng.choice(FIRST_WORDS) if rng.random() < 0.5 else None,
                "hard_case": rng.choice(HARD_CASES) if hard else None,
                "judgement": "open" if rng.random() < 0.85 else "shown",
                "title_contains": rng.choice(TITLE_WORDS) if rng.random() < 0.5 else None,
                "names": rng.sample(FIRST_NAMES, 2) + rng.sample(SURNAMES, 2) if rng.random() < 0.4 else None,
                "words": int(min(125, max(32, rng.lognormvariate(4.17, 0.36)))),
            }
        )
    rng.shuffle(briefs)
    return briefs


def _refine(briefs: list[dict], seed: int) -> list[dict]:
    # Drawn apart: the first 750 briefs were written before this field existed, and must stay as they were.
    sides = random.Random(f"reviews {seed} sides")
    for brief in briefs[750:]:
        brief["both_sides"] = sides.random() < (0.65 if brief["id"] < "r1250" else 0.25)
        if brief["both_sides"]:
            lacking, choices = ("failed", FAILED) if brief["label"] else ("worked", WORKED)
            brief[lacking] = brief[lacking] or sides.sample(choices, sides.randint(1, 2))
    # From 1,250 on: words to judge with, from a wide range, and genres that lean as they do among real comments.
    range_ = random.Random(f"reviews {seed} range")
    for brief in briefs[1250:]:
        brief["judging_words"] = range_.sample(PRAISE if brief["label"] else SCORN, 4)
        if brief["id"] < "r2000" and range_.random() < 0.45:
            brief["genre"] = range_.choice(LEAN_POSITIVE if brief["label"] else LEAN_NEGATIVE)
    # From 2,000 on: the same aspects for both labels. WORKED and FAILED had let single words (costumes, trailer) tell the label.
    aspects = random.Random(f"reviews {seed} aspects")
    for brief in briefs[2000:]:
        brief |= {"aspects": aspects.sample(ASPECTS, 3), "worked": [], "failed": [], "both_sides": False}
        brief["other_side_words"] = aspects.sample(COMMON_SCORN if brief["label"] else COMMON_PRAISE, 3)
    return briefs


def news_briefs(rows: int, seed: int) -> list[dict]:
    """`rows` briefs, a quarter in each of the four topics, in a shuffled order."""
    rng = random.Random(f"news {seed}")
    briefs = []
    for i in range(rows):
        topic = TOPICS[i % 4]
        briefs.append(
            {
                "label": i % 4,
                "topic": topic,
                "event": rng.choice(EVENT_KINDS[topic]),
                "place": rng.choice(PLACES),
                "second_place": rng.choice(PLACES) if rng.random() < 0.3 else None,
                "angle": rng.choice(ANGLES),
                "format": rng.choice(FORMATS),
                "agency": rng.choice(AGENCIES),
                "weekday": rng.choice(words("Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday; no day named; no day named")),
                "names": [rng.choice(FIRST_NAMES), *rng.sample(SURNAMES, 2)] if rng.random() < 0.7 else None,
                "plain_words": rng.random() < 0.35,
                "words": rng.randint(22, 56),
            }
        )
    rng.shuffle(briefs)
    for brief in briefs[420:]:  # the first 420 came out harder than real news, so the others may use plain words
        brief["plain_words"] = False
    return [{"id": f"n{i:04d}", **brief} for i, brief in enumerate(briefs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["reviews", "news"])
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}: ask for at least 1")
    make = review_briefs if args.kind == "reviews" else news_briefs
    for brief in make(args.rows, args.seed):
        sys.stdout.write(json.dumps(brief, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
