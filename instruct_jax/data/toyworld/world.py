"""ToyWorld: a whole instruction-following world in one seed.

A pretraining corpus, prompts from contributors, imperfect demonstrations, few-shot tasks and a gold
judge, all made by code, so that a GPT of a million parameters can go through the three stages in
minutes and every result can be checked against the truth. Everything is a pure function of
(config, seed, split, index): asking for more rows never changes the first ones.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from instruct_jax.data.rows import Demonstration, Document, Prompt
from instruct_jax.data.toyworld import corpus
from instruct_jax.data.toyworld.config import WorldConfig
from instruct_jax.data.toyworld.judge import Judge, Judgement
from instruct_jax.data.toyworld.spec import Spec, Task
from instruct_jax.data.toyworld.tasks import SKILLS, draw_skill
from instruct_jax.data.toyworld.writers import draw_flaws, good_answer, write_answer

Split = Literal["train", "valid", "test"]

PERSONAS = {
    "teacher": "For my class: ",
    "player": "For my game: ",
    "parent": "For my son: ",
    "worker": "For my work: ",
    "writer": "For my blog: ",
    "chatter": "Hi there! ",
    "friend": "Please help me. ",
}
"""What a contributor of user-based prompts writes before the request."""


@dataclass(frozen=True)
class ToyTask:
    """A few-shot question in the corpus's own form: `prompt` ends in "A:", an answer follows.

    `choices` hold the right answer first; each is ready to be appended, with its leading space.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...]
    family: str
    stop: str = "\n"


_FEW_SHOT = (
    (("Which one is an animal: red cow hat?", "cow"), ("What is the plural of cup?", "cups")),
    (("What colour is grass?", "green"), ("How many fruits are here: pear hat plum?", "two")),
    (("Dan is at the park. Where is Dan?", "park"), ("Name two animals.", "cat cow")),
    (("How do I wash a boat?", "soap"), ("Give me a fruit that begins with p.", "pear")),
)


class ToyWorld:
    """The embedded world of one seed."""

    stop = "\n"
    """Where a few-shot prompted base model's answer ends."""

    def __init__(self, seed: int = 0, config: WorldConfig | None = None):
        self.seed = seed
        self.config = config or WorldConfig()
        self._judge = Judge(self.config.judge)
        self._shares = self.config.splits.weights()
        self._contributors: dict[str, list[str]] = {split: [] for split in get_args(Split)}
        self._personas: dict[str, str] = {}
        for i in range(self.config.contributors):
            name = f"c{i:04d}"
            self._contributors[self._split_of(name)].append(name)
            self._personas[name] = Random(f"{seed}/persona/{name}").choice(tuple(PERSONAS))
        empty = [split for split, names in self._contributors.items() if not names]
        if empty:
            raise ValueError(f"no contributor falls into {empty}: raise WorldConfig.contributors")

    # --- rows ---------------------------------------------------------------------------------

    def pretraining_corpus(self, n_documents: int) -> list[Document]:
        """Documents to pretrain on; `meta["kind"]` says which sort."""
        return [self.document(i) for i in range(n_documents)]

    def tokenizer_texts(self, n: int) -> list[str]:
        """Text to train a small BPE on: documents, and as many words of dialogue as keep it whole.

        A GPT's tokenizer knows words that its tasks never showed; so "sorry" is one token here too.
        """
        rows = self.demonstrations(n)
        return [d.text for d in self.pretraining_corpus(n)] + [d.response for d in rows]

    def prompts(self, n: int, *, split: Split = "train", offset: int = 0) -> list[Prompt]:
        """Prompts offset..offset+n of a split; contributors and texts are disjoint between splits.

        ValueError when the split's contributors would pass their cap.
        """
        if split not in self._contributors:
            raise ValueError(f"no split {split!r}; there are {sorted(self._contributors)}")
        names = self._contributors[split]
        cap = self.config.prompts_per_contributor * len(names)
        if offset + n > cap:
            raise ValueError(
                f"{offset + n} prompts of split {split!r} pass the cap of "
                f"{self.config.prompts_per_contributor} for each of its {len(names)} contributors: "
                "raise WorldConfig.contributors"
            )
        return [self._prompt(split, i, names[i % len(names)]) for i in range(offset, offset + n)]

    def demonstrate(self, prompt: Prompt, *, draw: int = 0) -> Demonstration:
        """An imperfect writer's answer; `draw` asks for another one to the same prompt."""
        rng = Random(f"{self.seed}/demonstration/{draw}/{_key(prompt)}")
        spec, writer = Spec.from_meta(prompt.meta), self.config.writer
        flaws = draw_flaws(spec, writer, rng)
        restate = rng.random() < writer.restate
        response = write_answer(spec, rng, flaws=flaws, restate=restate)
        meta = {**prompt.meta, "flaws": list(flaws)}
        return Demonstration(prompt.text, response, meta)

    def demonstrations(
        self, n: int, split: Split = "train", *, offset: int = 0
    ) -> list[Demonstration]:
        """One demonstration for each of the split's prompts offset..offset+n."""
        return [self.demonstrate(p) for p in self.prompts(n, split=split, offset=offset)]

    def answer(
        self, prompt: Prompt, *, flaws: tuple[str, ...] = (), restate: bool = True, draw: int = 0
    ) -> str:
        """An answer with exactly these flaws; without any it is one of the best answers."""
        rng = Random(f"{self.seed}/answer/{draw}/{_key(prompt)}")
        return write_answer(Spec.from_meta(prompt.meta), rng, flaws=flaws, restate=restate)

    def curt_answer(self, prompt: Prompt, *, draw: int = 0) -> str:
        """The right answer as the corpus would give it: bare, never a decline."""
        rng = Random(f"{self.seed}/curt/{draw}/{_key(prompt)}")
        spec = Spec.from_meta(prompt.meta)
        if spec.check in ("decline", "unknown"):
            return spec.wrong[0]
        return spec.answer if spec.check == "include" else good_answer(spec, rng)

    # --- judging, prompting, tasks ------------------------------------------------------------

    def judge(self, prompt: Prompt, response: str, ended: bool = True) -> Judgement:
        """The gold judgement; `ended`: the response stopped by itself inside its budget."""
        return self._judge(prompt, response, ended=ended)

    def few_shot_prefixes(self) -> tuple[str, ...]:
        """Candidates for the prefix of the prompted base model (SFT-7), in the corpus's form."""
        return tuple(
            "".join(f"Q: {question}\nA: {answer}\n" for question, answer in pairs)
            for pairs in _FEW_SHOT
        )

    def prompted(self, prompt: Prompt, *, prefix: int = 0) -> str:
        """A prompt as the few-shot prompted base model gets it; its answer ends at `stop`."""
        return f"{self.few_shot_prefixes()[prefix]}Q: {prompt.text.strip()}\nA:"

    def tasks(self, n: int, *, shots: int = 2) -> list[ToyTask]:
        """Few-shot questions with one right answer, on texts that no training prompt has."""
        return [self._task(i, shots) for i in range(n)]

    # --- how rows are made --------------------------------------------------------------------

    def _split_of(self, key: str) -> Split:
        """A salted hash decides, so that new contributors and texts never move old ones."""
        digest = hashlib.blake2b(f"{self.config.salt}/{key}".encode(), digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64 * sum(self._shares.values())
        for split in get_args(Split):
            point -= self._shares[split]
            if point < 0:
                return split
        return "train"

    def _draw_task(self, rng: Random, solved: bool) -> Task:
        families = self.config.families
        name, variant = (
            corpus.draw_solved_skill(rng, families)
            if solved
            else draw_skill(rng, families.draw(rng))
        )
        return SKILLS[name].make(rng, variant)

    def document(self, index: int) -> Document:
        """The document of this number, of a corpus without end."""
        rng = Random(f"{self.seed}/document/{index}")
        kind = self.config.corpus.draw(rng)
        if kind == "story":
            text = corpus.story(rng)
        elif kind == "worksheet":
            text = corpus.worksheet(rng, self._draw_request)
        elif kind == "solved":
            text = corpus.solved_worksheet(rng, self._draw_task)
        elif kind == "drill":
            text = corpus.drill(rng, self.config.families)
        else:
            text = corpus.note(rng)
        return Document(text, {"kind": kind})

    def _draw_request(self, rng: Random, solved: bool) -> Task:
        """A task of a worksheet, where users' own words come up as well."""
        task = self._draw_task(rng, solved)
        if self.config.kinds.draw(rng) != "user_based":
            return task
        return replace(task, plain=PERSONAS[rng.choice(tuple(PERSONAS))] + task.plain)

    def _prompt(self, split: Split, index: int, contributor: str) -> Prompt:
        rng = Random(f"{self.seed}/prompt/{split}/{index}")
        persona = self._personas[contributor]
        kind, family = self.config.kinds.draw(rng), self.config.families.draw(rng)
        for tries in itertools.count():
            if tries >= 100:  # a small family may have no text of this wording in this split
                family = self.config.families.draw(rng)
            skill, variant = draw_skill(rng, family)
            task = SKILLS[skill].make(rng, variant)
            text = self._wording(rng, kind, task, skill, variant, persona)
            if self._split_of(text) == split:
                break
        use_case = SKILLS[skill].use_case
        if kind == "user_based" and persona in ("chatter", "friend"):
            use_case = "chat"
        meta = {
            "id": f"{split}-{index}",
            "family": family,
            "skill": skill,
            "kind": kind,
            "use_case": use_case,
            "contributor": contributor,
            "persona": persona,
            "annotations": _annotations(task.spec),
            "task": task.spec.to_meta(),
        }
        return Prompt(text, meta)

    def _wording(
        self, rng: Random, kind: str, task: Task, skill: str, variant: str, persona: str
    ) -> str:
        if kind == "plain":
            return f"{task.plain}\n"
        if kind == "user_based":
            return f"{PERSONAS[persona]}{task.plain}\n"
        like = SKILLS[SKILLS[skill].shots or skill]
        variants = like.variants if like.shots_of_any_variant else (variant,)
        queries = {task.query}
        pairs = []
        for _ in range(1 if len(task.query) > 24 else 2):
            shot = like.make(rng, rng.choice(variants))
            while shot.query in queries:
                shot = like.make(rng, rng.choice(variants))
            queries.add(shot.query)
            pairs.append(f"{shot.query}\n{write_answer(shot.spec, rng)}\n")
        return f"{task.head}\n{''.join(pairs)}{task.query}\n"

    def _task(self, index: int, shots: int) -> ToyTask:
        rng = Random(f"{self.seed}/task/{index}")
        while True:
            name, variant = corpus.draw_solved_skill(rng, self.config.families)
            task = SKILLS[name].make(rng, variant)
            single = task.spec.check == "slot" and task.spec.wrong
            if single and self._split_of(f"{task.plain}\n") == "test":
                break
        pairs: list[str] = []
        while len(pairs) < shots:
            shot = self._draw_task(rng, True)
            if shot.plain != task.plain and shot.spec.check == "slot":
                pairs.append(f"Q: {shot.plain}\nA: {shot.spec.answer}\n")
        prompt = f"{''.join(pairs)}Q: {task.plain}\nA:"
        choices = dict.fromkeys((task.spec.answer, *task.spec.wrong))
        return ToyTask(
            prompt, f" {task.spec.answer}", tuple(f" {c}" for c in choices), task.spec.family
        )


def _key(prompt: Prompt) -> str:
    """Two prompts of one text still get answers of their own."""
    return f"{prompt.meta.get('id', '')}/{prompt.text}"


def _annotations(spec: Spec) -> dict[str, bool]:
    """What the paper's labelers noted about a prompt (Table 7), as far as it occurs here."""
    return {
        "closed_domain": spec.closed_domain,
        "continuation_style": spec.check == "story",
        "sensitive": spec.check == "decline",
        "other_explicit_constraints": spec.constrained,
    }
