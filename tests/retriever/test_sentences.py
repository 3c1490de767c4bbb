"""Where chunks begin: at ends of sentences in every script, and never inside a grapheme cluster."""

from __future__ import annotations

import random

import pytest
import regex
from helpers_tokenizer import tiny_tokenizer

from chunkcache.retriever.chunking import split
from chunkcache.retriever.documents import Document

# A sentence, what ends it, and what stands between two.
SENTENCES = {
    "Amharic": ("የወደቡ ክሬን በ1905 ዓመት ተዛወረ፣ ማዕበሉ ሐዲዱን ካጠማዘዘ በኋላ", "።", " "),
    "Amharic, two word dividers": ("የወደቡ ክሬን በ1905 ዓመት ተዛወረ", "፡፡", " "),
    "Arabic": ("هل نقلت رافعة الميناء إلى الرصيف الشمالي، بعد العاصفة", "؟", " "),
    "Armenian": ("Նավահանգստի կռունկը տեղափոխվել է հյուսիսային նավամատույց", "։", " "),
    "Armenian, colon": ("Նավահանգստի կռունկը տեղափոխվել է հյուսիսային նավամատույց", ":", " "),
    "Bengali": ("বন্দরের ক্রেনটি উত্তর ঘাটে সরানো হয়েছিল, ঝড়ের পরে", "।", " "),
    "Burmese": ("ဆိပ်ကမ်းကရိန်းကို၊ မြောက်ဘက်ဆိပ်ခံသို့ ရွှေ့ခဲ့သည်", "။", " "),
    "Burmese, no space": ("ဆိပ်ကမ်းကရိန်းကို၊မြောက်ဘက်ဆိပ်ခံသို့ရွှေ့ခဲ့သည်", "။", ""),
    "Chinese": ("港口的起重机在1905年被移到北码头，因为风暴弄弯了它的轨道", "。", ""),
    "Chinese, quoted": ("他说：“港口的起重机被移到北码头，因为风暴弄弯了它的轨道", "。”", ""),
    "Cree": ("ᓂᑲᒧ ᐊᐘ ᐃᐢᑫᐧᐤ ᑭᐦᒋ ᑲᒥᑯᕽ", "᙮", " "),
    "English": ("The harbour crane was moved to the north quay, after the storm", ".", " "),
    "Greek": ("Μεταφέρθηκε ο γερανός του λιμανιού στη βόρεια αποβάθρα", ";", " "),
    "Hebrew": ("בראשית ברא אלהים את השמים ואת הארץ", "׃", " "),
    "Hindi": ("बंदरगाह की क्रेन 1905 में उत्तरी घाट पर ले जाई गई, और तूफ़ान था", "।", " "),
    "Hindi, quoted": ('उसने कहा, "क्रेन उत्तरी घाट पर ले जाई गई', '।"', " "),
    "Javanese": ("ꦥꦭꦧꦸꦲꦤ꧀꧈ꦏꦺꦴꦠ ꦏꦭꦶꦃ ꦱꦏꦶꦁ", "꧉", " "),
    "Khmer": ("ស្ទូចកំពង់ផែត្រូវបានផ្លាស់ទីទៅច្រាំងខាងជើង", "។", " "),
    "Khmer, end": ("ស្ទូចកំពង់ផែត្រូវបានផ្លាស់ទីទៅច្រាំងខាងជើង", "៕", ""),
    "Meetei Mayek": ("ꯃꯅꯤꯄꯨꯔ ꯑꯁꯤ ꯏꯟꯗꯤꯌꯥꯒꯤ ꯑꯋꯥꯡ ꯅꯣꯡꯄꯣꯛ", "꯫", " "),
    "Mongolian": ("ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠂ ᠬᠡᠯᠡ ᠪᠢᠴᠢᠭ", "᠃", " "),
    "N'Ko": ("ߒߞߏ ߦߋ߫ ߛߓߍߛߎ߲ ߘߏ߫ ߟߋ߬ ߘߌ߫", "߹", " "),
    "Ol Chiki": ("ᱥᱟᱱᱛᱟᱲᱤ ᱯᱟᱹᱨᱥᱤ ᱫᱚ ᱥᱤᱧᱚᱛᱼᱨᱮ", "᱾", " "),
    "Sanskrit": ("धर्मक्षेत्रे कुरुक्षेत्रे समवेता युयुत्सवः", "॥", " "),
    "Sinhala": ("වරායේ දොඹකරය උතුරු තොටුපළට ගෙන යන ලදී", "෴", " "),
    "Syriac": ("ܡܠܟܐ ܕܡܕܝܢܬܐ ܐܙܠ ܠܒܝܬܗ ܪܒܐ", "܀", " "),
    "Tamil": ("துறைமுகக் கிரேன் வடக்குத் துறைக்கு மாற்றப்பட்டது, புயலுக்குப் பின்", ".", " "),
    "Tibetan": ("རྒྱ་མཚོའི་གྲུ་ཁའི་འདེགས་འཁོར་བྱང་གི་གྲུ་ཁར་སྤོས་པ་རེད", "།", " "),
    "Urdu": ("بندرگاہ کی کرین شمالی گھاٹ پر منتقل کی گئی، اور طوفان آیا", "۔", " "),
}


def size_of(text):
    return len(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


def cut(text, size, overlap=0):
    return split(Document("d", "d", text), tiny_tokenizer(), size=size, overlap=overlap)


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("each", [6, 240], ids=["short paragraphs", "one long paragraph"])
def test_sentences_end_at_the_marks_of_their_script(name, each):
    sentence, mark, gap = SENTENCES[name]
    whole = sentence + mark
    text = "\n\n".join([gap.join([whole] * each)] * (240 // each))
    chunks = cut(text, 4 * size_of(whole))
    assert len(chunks) >= 40
    for chunk in chunks:
        assert chunk.text.startswith(sentence[:6])
        assert chunk.text.endswith(mark)


def test_marks_in_a_row_end_one_sentence():
    for marks in ("؟!", "।।", "། །", "？！", "‼️", "॥ ॥"):
        text = f"तूफ़ान आया{marks} " * 40
        for chunk in cut(text, size_of(text) // 9):
            assert chunk.text.endswith(marks)


def test_a_mark_inside_a_number_ends_nothing():
    for number in ("３．１４", "3.14"):
        sentence = f"円周率は{number}です。"
        for chunk in cut(sentence * 200, 3 * size_of(sentence)):
            assert chunk.text.startswith("円周率は")


CLUSTERS = {
    "flags": ["🇩🇪", "🇫🇷", "🇯🇵", "🇧🇷"],
    "families": ["👨\u200d👩\u200d👧\u200d👦", "👩🏽\u200d🚀", "❤️\u200d🔥", "👍🏿"],
    "keycaps": ["1️⃣", "2️⃣", "#️⃣"],
    "jamo": ["\u1112\u1161\u11ab", "\u1100\u1173\u11af", "각"],
    "Devanagari": ["क्षि", "स्त्री", "र्ध्व", "त्त्व"],
    "Tamil": ["நி", "கௌ", "ஸ்ரீ"],
    "Thai": ["กำ", "ที่", "น้ำ"],
    "combining marks": ["e\u0302\u0301", "q\u0323\u0307", "o\u030a"],
    "all": ["a", "漢", "é", "👍🏿", "क्ष", "、", "。", "！", "‼️", " ", "\r\n", "ག་", "\u200b", "a ", "।", "🇩🇪"],
}


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("overlap", [0, 30])
def test_no_border_stands_inside_a_grapheme(name, overlap):
    draw = random.Random(3)
    widest = max(size_of(cluster) for cluster in CLUSTERS[name])
    for size in (widest, widest + 5, 2 * widest + 1, 80):
        text = "".join(draw.choices(CLUSTERS[name], k=300))
        borders = {found.start() for found in regex.finditer(r"\X", text)} | {len(text)}
        for chunk in cut(text, size + overlap, overlap):
            assert chunk.tokens <= size + overlap
            assert {chunk.start, chunk.start + len(chunk.text)} <= borders


def test_a_grapheme_longer_than_a_chunk_is_cut_and_the_others_are_whole():
    text = "q\u0323\u0307" * 30 + "e" + "\u0301" * 40 + "q\u0323\u0307" * 30
    chunks = cut(text, 16)
    assert "".join(chunk.text for chunk in chunks) == text
    assert max(chunk.tokens for chunk in chunks) <= 16
    borders = {found.start() for found in regex.finditer(r"\X", text)}
    inside = [chunk.start for chunk in chunks if chunk.start not in borders]
    assert all(90 < start < 131 for start in inside)
    assert inside


def test_private_characters_are_no_stand_ins():
    text = "\U000f0000q\u0323\U000f0001\U0010fffd" * 60
    chunks = cut(text, 40)
    assert "".join(chunk.text for chunk in chunks) == text
    assert all(chunk.text[0] != "\u0323" for chunk in chunks)
