// The heat map: where a guest's memory is written, cell by cell.

import { bytes, count, element, many, setClass, setText } from "./words.js";

/// From so many pages a second on, a cell has the next colour.
const STEPS = [1, 10, 100, 1e3, 1e4, 1e5];
/// How often a screen reader's text may change.
const TEXT_EVERY_MS = 10_000;

const address = (number) => `0x${number.toString(16)}`;

/// The map of one VM.
export class Heat {
    constructor(vm) {
        this.vm = vm;
        this.told = 0;
        this.shape = null;
        this.cells = [];
        this.value = element("span", { class: "value" });
        this.grid = element("div", { class: "cells", role: "img" });
        this.size = element("span");
        const key = STEPS.map((from, at) => {
            const text = at + 1 === STEPS.length ? `${count(from)} or more` : count(from);
            return element("li", {}, element("span", { class: `heat-${at + 1}` }), text);
        });
        const scale = element("ul", { class: "scale" }, element("li", {}, element("span", { class: "heat-0" }), "none"), ...key);
        this.box = element(
            "figure",
            { class: "heat" },
            element("figcaption", {}, "Memory written ", this.value),
            this.grid,
            element("p", { class: "quiet" }, this.size, " Pages written a second, from: ", scale),
        );
        this.box.hidden = true;
    }

    /// Shows what the node says now; nothing if it says nothing.
    show(heat) {
        this.box.hidden = !heat;
        if (!heat) return;
        const shape = JSON.stringify([heat.cell_bytes, heat.ranges]);
        if (shape !== this.shape) this.arrange(heat, shape);
        for (const [at, cell] of this.cells.entries()) cell.show(heat.pages_per_s[at]);
        const text = summary(heat);
        setText(this.value, text);
        if (Date.now() - this.told < TEXT_EVERY_MS) return;
        this.told = Date.now();
        this.grid.setAttribute("aria-label", `Memory of ${this.vm}: ${text}`);
    }

    arrange(heat, shape) {
        this.shape = shape;
        this.told = 0;
        const all = places(heat);
        this.cells = all.map((place) => new Cell(place));
        this.grid.replaceChildren(...this.cells.map((cell) => cell.box));
        const holes = all.some((place) => place.edge) ? "; an edge is where addresses are left out" : "";
        setText(this.size, `${many(this.cells.length, "cell")} of ${bytes(heat.cell_bytes)}, by address${holes}.`);
    }
}

class Cell {
    constructor({ first, size, edge }) {
        this.box = element("span");
        this.edge = edge ? " edge" : "";
        this.where = `${address(first)} to ${address(first + size - 1)} (${bytes(size)})`;
        this.rate = null;
    }

    show(rate) {
        if (rate === this.rate) return;
        this.rate = rate;
        setClass(this.box, `heat-${STEPS.filter((from) => rate >= from).length}${this.edge}`);
        this.box.title = `${this.where}: ${rate === 0 ? "nothing written" : `${pages(rate)} a second`}`;
    }
}

function pages(number) {
    return number === 1 ? "1 page" : `${count(number)} pages`;
}

/// The address and the size of each cell, and whether there is a hole before it.
function places({ cell_bytes, ranges }) {
    return ranges.flatMap(({ first, bytes: all }, range) => {
        const before = ranges[range - 1];
        const hole = before !== undefined && before.first + before.bytes < first;
        return Array.from({ length: Math.ceil(all / cell_bytes) }, (_, at) => ({
            first: first + at * cell_bytes,
            size: Math.min(cell_bytes, all - at * cell_bytes),
            edge: hole && at === 0,
        }));
    });
}

/// The map in a sentence.
export function summary(heat) {
    const total = heat.pages_per_s.reduce((sum, rate) => sum + rate, 0);
    if (total === 0) return "nothing is written";
    const all = `${pages(total)} a second`;
    const spot = hottest(heat, (total * 3) / 4);
    if (spot === null) return `${all}, all over the memory`;
    return `${all}; three quarters of them are in ${bytes(spot.size)} at ${address(spot.first)}`;
}

/// The shortest piece of memory that has so many of the writes; `null` if that is more than half of it.
function hottest({ cell_bytes, ranges, pages_per_s }, wanted) {
    let best = null;
    let before = 0;
    for (const { first, bytes: all } of ranges) {
        const rates = pages_per_s.slice(before, (before += Math.ceil(all / cell_bytes)));
        let from = 0;
        let sum = 0;
        for (const [to, rate] of rates.entries()) {
            sum += rate;
            while (from < to && sum - rates[from] >= wanted) sum -= rates[from++];
            const size = Math.min(all, (to + 1) * cell_bytes) - from * cell_bytes;
            if (sum >= wanted && size < (best?.size ?? Infinity)) best = { first: first + from * cell_bytes, size };
        }
    }
    const memory = ranges.reduce((sum, range) => sum + range.bytes, 0);
    return best !== null && best.size <= memory / 2 ? best : null;
}
