// Time lines: each VM has a few lanes, and each lane draws one kind of figure on a canvas.

import { MARKS, bytes, clock, count, element, micros, setText } from "./words.js";

const WINDOW_MS = 5 * 60_000;
const HEIGHT = 72;
/// Room for marks above the figures.
const TOP = 12;
/// A second that is missing is a gap.
const GAP_MS = 2500;
/// For how long the last figures are those of now: a busy host may be late.
const NOW_MS = 6000;
/// How often a screen reader's text of a lane may change.
const TEXT_EVERY_MS = 10_000;

/// What is drawn: the lowest line of the scale, the highest at least, how much more the next line is, and how numbers are
/// written.
const LANES = {
    pause_us: { title: "Pause", low: 10, high: 1e4, write: micros, legend: "for how long a checkpoint stopped the guest" },
    dirty_pages: { title: "Dirty pages", low: 1, high: 1e3, write: count, legend: "pages that the guest changed between two checkpoints" },
    commit_us: { title: "Commit", low: 100, high: 1e5, write: micros, legend: "from the end of the pause until the standby has the whole checkpoint" },
    held_bytes: { title: "Held output", low: 64, high: 1 << 18, step: 16, write: bytes, legend: "what the guest had sent and waited for that" },
    apply_us: { title: "Apply", low: 10, high: 1e5, write: micros, legend: "how long this host, as the standby, took to apply a checkpoint" },
};
const OF_PRIMARY = ["pause_us", "dirty_pages", "commit_us", "held_bytes"];

const everybody = new Set();

export function redrawAll() {
    palette = null;
    for (const it of everybody) it.draw();
}

let palette = null;

function colours() {
    if (palette === null) {
        const style = getComputedStyle(document.documentElement);
        const of = (name) => style.getPropertyValue(`--${name}`).trim();
        palette = Object.fromEntries(
            ["paper", "quiet", "line", "bar", "bar-light", "bare", "away", "good", "warn", "bad", "note"].map((it) => [it, of(it)]),
        );
    }
    return palette;
}

/// Explains lanes and marks.
export function showLegend(list) {
    for (const lane of Object.values(LANES)) {
        list.append(element("dt", {}, lane.title), element("dd", {}, lane.legend));
    }
    for (const mark of Object.values(MARKS)) {
        list.append(element("dt", { class: mark.tone }, mark.sign), element("dd", {}, mark.text));
    }
    list.append(element("dt", {}, element("span", { class: "swatch bare" })), element("dd", {}, "the VM was not protected"));
    list.append(element("dt", {}, element("span", { class: "swatch away" })), element("dd", {}, "the VM ran at the other host"));
}

/// The lanes of one VM.
export class Lanes {
    constructor(vm, box) {
        this.vm = vm;
        this.box = box;
        this.points = [];
        this.marks = [];
        this.lanes = new Map();
        everybody.add(this);
    }

    end() {
        everybody.delete(this);
    }

    /// Takes new points; `anew` throws the old ones away.
    take(points, anew) {
        if (anew) this.points = [];
        for (const point of points) this.points.push({ ...point, at: Date.parse(point.time) });
        const from = Date.now() - WINDOW_MS - GAP_MS;
        this.points = this.points.filter((it) => it.at > from);
        this.marks = this.marks.filter((it) => it.at > from);
    }

    /// Something that the process could not say itself.
    mark(time, name) {
        const at = Date.parse(time);
        if (!this.marks.some((it) => it.at === at && it.name === name)) this.marks.push({ at, name });
    }

    draw() {
        const now = Date.now();
        const last = this.points.at(-1);
        const has = (name) => this.points.some((it) => it[name] !== null);
        const usual = last?.role === "standby" ? ["apply_us"] : OF_PRIMARY;
        const names = Object.keys(LANES).filter((name) => usual.includes(name) || has(name));
        this.box.hidden = this.points.length === 0;
        if (this.box.hidden) return;
        if (names.join() !== [...this.lanes.keys()].join()) this.arrange(names);
        for (const lane of this.lanes.values()) lane.draw(this, now);
    }

    arrange(names) {
        const lanes = names.map((name) => [name, this.lanes.get(name) ?? new Lane(name, this)]);
        this.lanes = new Map(lanes);
        this.box.replaceChildren(...lanes.map(([, lane]) => lane.figure));
    }

    /// All that has happened, oldest first.
    happened() {
        const told = this.points.flatMap((point) => point.marks.map((name) => ({ at: point.at, name })));
        return [...told, ...this.marks].sort((a, b) => a.at - b.at);
    }
}

class Lane {
    constructor(name, owner) {
        this.name = name;
        this.kind = LANES[name];
        this.value = element("span", { class: "value" });
        this.canvas = element("canvas", { role: "img" });
        this.figure = element("figure", {}, element("figcaption", {}, `${this.kind.title} `, this.value), this.canvas);
        this.pointed = null;
        this.told = 0;
        this.canvas.addEventListener("pointermove", (event) => {
            this.pointed = event.offsetX / this.canvas.clientWidth;
            this.draw(owner, Date.now());
        });
        this.canvas.addEventListener("pointerleave", () => {
            this.pointed = null;
            this.draw(owner, Date.now());
        });
    }

    draw(owner, now) {
        const width = this.canvas.clientWidth;
        if (width === 0) return;
        const scale = devicePixelRatio || 1;
        if (this.canvas.width !== Math.round(width * scale)) {
            this.canvas.width = Math.round(width * scale);
            this.canvas.height = Math.round(HEIGHT * scale);
        }
        const to = this.canvas.getContext("2d");
        to.setTransform(scale, 0, 0, scale, 0, 0);
        to.clearRect(0, 0, width, HEIGHT);
        const { low, high, step = 10 } = this.kind;
        const largest = Math.max(high, ...owner.points.map((it) => it[this.name]?.most ?? it[this.name]?.mean ?? 0));
        const steps = (value) => Math.log(value / low) / Math.log(step);
        const lines = Math.ceil(steps(largest) - 1e-9);
        const view = {
            to,
            width,
            now,
            lines,
            step,
            x: (at) => width - ((now - at) / WINDOW_MS) * width,
            y: (value) => HEIGHT - (Math.min(lines, steps(Math.max(value, low))) / lines) * (HEIGHT - TOP),
        };
        this.bands(view, owner.points);
        this.grid(view);
        this.bars(view, owner.points);
        this.numbers(view);
        this.signs(view, owner.happened());
        this.say(owner, now);
    }

    /// When the VM was not protected, or not here.
    bands({ to, x }, points) {
        for (const point of points) {
            // A standby applies what another host runs, and has nothing of its own to show elsewhere.
            const away = point.role === "standby" && this.name !== "apply_us";
            if (point.protected && !away) continue;
            to.fillStyle = away ? colours().away : colours().bare;
            const from = Math.floor(x(point.at - point.span_ms));
            to.fillRect(from, TOP, Math.max(1, Math.ceil(x(point.at)) - from), HEIGHT - TOP);
        }
    }

    grid({ to, width, now, lines, x }) {
        to.lineWidth = 1;
        to.strokeStyle = colours().line;
        const stroke = (fromX, fromY, toX, toY) => {
            to.beginPath();
            to.moveTo(fromX, fromY);
            to.lineTo(toX, toY);
            to.stroke();
        };
        for (let line = 0; line <= lines; line += 1) {
            const y = Math.round(HEIGHT - (line / lines) * (HEIGHT - TOP)) + (line === 0 ? -0.5 : 0.5);
            stroke(0, y, width, y);
        }
        for (let minute = Math.ceil((now - WINDOW_MS) / 60_000) * 60_000; minute < now; minute += 60_000) {
            stroke(Math.round(x(minute)) + 0.5, TOP, Math.round(x(minute)) + 0.5, HEIGHT);
        }
    }

    /// What the lines are worth, where there is room, and readable on whatever is under it.
    numbers({ to, lines, step }) {
        to.font = "10px system-ui, sans-serif";
        to.textBaseline = "bottom";
        to.lineWidth = 3;
        to.lineJoin = "round";
        to.strokeStyle = colours().paper;
        to.fillStyle = colours().quiet;
        const each = lines > 4 ? 2 : 1;
        for (let line = each; line < lines; line += each) {
            const y = Math.round(HEIGHT - (line / lines) * (HEIGHT - TOP)) + 6;
            const text = this.kind.write(this.kind.low * step ** line);
            to.strokeText(text, 2, y);
            to.fillText(text, 2, y);
        }
        to.lineWidth = 1;
    }

    bars({ to, x, y }, points) {
        for (const point of points) {
            const spread = point[this.name];
            if (spread === null) continue;
            // Whole pixels: the edges of two bars side by side would be lighter than the bars.
            const from = Math.floor(x(point.at - Math.min(point.span_ms, GAP_MS)));
            const wide = Math.max(1, Math.floor(x(point.at)) - from);
            const most = spread.most === null ? TOP : y(spread.most);
            const mean = y(spread.mean);
            to.fillStyle = colours()["bar-light"];
            to.fillRect(from, most, wide, HEIGHT - most);
            to.fillStyle = colours().bar;
            to.fillRect(from, mean, wide, HEIGHT - mean);
        }
    }

    signs({ to, x }, marks) {
        to.font = "bold 11px system-ui, sans-serif";
        to.textAlign = "center";
        let taken = -Infinity;
        for (const { at, name } of marks) {
            const mark = MARKS[name];
            if (mark === undefined) continue;
            to.fillStyle = to.strokeStyle = colours()[mark.tone];
            to.beginPath();
            to.moveTo(x(at), TOP);
            to.lineTo(x(at), HEIGHT);
            to.stroke();
            if (x(at) - taken < 9) continue;
            taken = x(at);
            to.fillText(mark.sign, Math.max(5, x(at)), TOP);
        }
        to.textAlign = "start";
    }

    /// The last value, or the one that is pointed at; and from time to time the same for who sees nothing.
    say(owner, now) {
        const points = owner.points;
        const wanted = this.pointed === null ? now : now - (1 - this.pointed) * WINDOW_MS;
        const near = points.findLast((it) => it.at - it.span_ms <= wanted);
        const point = near && wanted - near.at < (this.pointed === null ? NOW_MS : GAP_MS) ? near : undefined;
        const when = this.pointed === null ? "" : `${clock(wanted)}: `;
        setText(this.value, when + this.write(point?.[this.name]));
        if (now - this.told < TEXT_EVERY_MS) return;
        this.told = now;
        const all = points.map((it) => it[this.name]).filter((it) => it !== null);
        const most = Math.max(0, ...all.map((it) => it.most ?? it.mean));
        const marks = owner.happened().map(({ at, name }) => `${clock(at)} ${MARKS[name]?.text ?? name}`);
        const text = all.length === 0 ? "no figures" : `now ${this.write(all.at(-1))}; at most ${this.kind.write(most)} in five minutes`;
        this.canvas.setAttribute("aria-label", [`${this.kind.title} of ${owner.vm}: ${text}`, ...marks].join(". "));
    }

    write(spread) {
        if (!spread) return "–";
        const { write } = this.kind;
        return spread.most === null ? `${write(spread.mean)}, some beyond measure` : `${write(spread.mean)}, ≤ ${write(spread.most)}`;
    }
}
