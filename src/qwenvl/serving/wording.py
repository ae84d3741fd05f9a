"""The words of the web page, in two languages.

Wording             everything that the page says
ENGLISH, CHINESE    the two tables
WORDINGS            both, by the code that the page's switch has
"""

from __future__ import annotations

from dataclasses import dataclass

from .refusals import Refused


@dataclass(frozen=True)
class Wording:
    """What stands on the page. `{}` is filled in."""

    name: str  # of the language, in the language
    language: str
    about: str
    demonstration: str
    notes: dict[str, str]  # a checkpoint's note -> what it says in this language
    base: str
    chat: str
    empty_chat: str
    type_here: str
    send: str
    stop: str
    regenerate: str
    undo: str
    clear: str
    examples: str
    picture: str
    empty_picture: str
    no_boxes: str
    toggle: str
    unnamed: str
    download: str
    settings: str
    way: str
    greedy: str
    sampled: str
    temperature: str
    top_p: str
    top_k: str
    penalty: str
    longest: str
    seed: str
    nothing_to_send: str
    nothing_to_repeat: str
    too_many: str
    refused: str
    refusals: dict[str, str]  # a refusal's code -> what it says in this language

    def refusal(self, error: Refused) -> str:
        """One line on why there is no answer."""
        return self.refusals.get(error.code or "") or self.refused.format(error.body["error"]["message"])

    def note(self, note: str) -> str:
        """What a checkpoint says about itself; as it stands there if it has not been translated."""
        return self.demonstration.format(self.notes.get(note, note))


TINY_NOTE = "a demonstration: it knows drawn shapes and short printed words, not photographs"

ENGLISH = Wording(
    name="English",
    language="Language",
    about="Show it pictures, ask about them, and have it mark what it finds.",
    demonstration="Please note: this model is {}.",
    notes={},
    base="This is a base model. It goes on from what you write and does not see earlier messages.",
    chat="Conversation",
    empty_chat="Add pictures with the clip below or paste them, and ask about them. Or begin with an example.",
    type_here="Ask about a picture",
    send="Send",
    stop="Stop",
    regenerate="Regenerate",
    undo="Undo",
    clear="Clear",
    examples="Examples, each a new conversation",
    picture="What it marks",
    empty_picture="Ask where something is: the boxes are drawn here.",
    no_boxes="The latest answer marks nothing.",
    toggle="Click a phrase to hide or show its boxes.",
    unnamed="no name",
    download="Download this picture",
    settings="How answers are chosen",
    way="Choice of each word",
    greedy="Always the likeliest",
    sampled="Drawn at random",
    temperature="Temperature",
    top_p="Top-p (1 is off)",
    top_k="Top-k (0 is off)",
    penalty="Repetition penalty (1 is off)",
    longest="Longest answer, in tokens",
    seed="Seed (empty: a new one each time)",
    nothing_to_send="Write something, or add a picture.",
    nothing_to_repeat="There is no question to answer again.",
    too_many="A message can show {} pictures here.",
    refused="No answer: {}",
    refusals={},
)

CHINESE = Wording(
    name="中文",
    language="语言",
    about="上传图片，提出问题，让模型标出它找到的东西。",
    demonstration="请注意：这个模型{}。",
    notes={TINY_NOTE: "只是一个演示：它认识画出的图形和印出的短词，不认识照片"},
    base="这是基础模型：它接着您写的文字往下写，看不到之前的消息。",
    chat="对话",
    empty_chat="用下面的回形针添加图片，或直接粘贴，然后提问。也可以从示例开始。",
    type_here="就图片提问",
    send="发送",
    stop="停止",
    regenerate="重新回答",
    undo="撤回",
    clear="清空",
    examples="示例（每个开始新的对话）",
    picture="标注结果",
    empty_picture="问问某样东西在哪里：方框会画在这里。",
    no_boxes="最新的回答没有标注。",
    toggle="点击短语可以隐藏或显示它的方框。",
    unnamed="未命名",
    download="下载这张图片",
    settings="回答的生成方式",
    way="每个词的选择",
    greedy="总选最可能的",
    sampled="随机抽取",
    temperature="温度",
    top_p="Top-p（1 为关闭）",
    top_k="Top-k（0 为关闭）",
    penalty="重复惩罚（1 为关闭）",
    longest="回答的最大长度（token）",
    seed="随机种子（留空则每次不同）",
    nothing_to_send="请输入文字或添加图片。",
    nothing_to_repeat="没有可以重新回答的问题。",
    too_many="这里每条消息最多 {} 张图片。",
    refused="无法回答：{}",
    refusals={
        "queue_full": "服务器现在太忙：请稍后再试。",
        "stopping": "服务器正在停止：请稍后再试。",
        "timeout": "回答花的时间超过了服务器的限制。",
        "context_length_exceeded": "问题太长，超过了模型的上下文：请缩短。",
        "unavailable": "模型已停止工作：请重启服务器。",
        "picture_gone": "对话中的一张图片已不在服务器上：请重新添加。",
        "internal_error": "回答失败：原因见服务器日志。",
    },
)

WORDINGS = {"en": ENGLISH, "zh": CHINESE}
