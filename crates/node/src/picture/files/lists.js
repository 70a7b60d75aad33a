// Jobs and events.

import { KINDS, clock, element, many, setClass, setText, span } from "./words.js";

const MOST_JOBS = 12;
const MOST_EVENTS = 200;
const SIGNS = { running: "◌", succeeded: "●", failed: "✕", cancelled: "○" };
const TONES = { running: "wait", succeeded: "good", failed: "bad", cancelled: "calm" };

/// What a job has come to, in a line.
function outcome(job) {
    if (job.error) return `${job.error.message}${job.error.remedy ? `; ${job.error.remedy}` : ""}`;
    if (job.result === null) return "";
    const moved = (job.result.moved ?? []).map((it) => `${it.vm} has moved (${span(it.took_ms)})`);
    const did = job.result.said ?? job.result.state ?? job.result.end ?? many(moved.length, "VM") + " moved";
    const took = job.result.took_ms === undefined ? "" : ` (${span(job.result.took_ms)})`;
    return [`${did}${took}`, ...moved].join("; ");
}

export class Jobs {
    constructor(table, none, give) {
        this.table = table;
        this.body = table.tBodies[0];
        this.none = none;
        this.give = give;
        this.rows = new Map();
    }

    show(jobs) {
        const newest = jobs.slice(-MOST_JOBS).reverse();
        const rows = newest.map((job) => {
            const row = this.rows.get(job.id) ?? this.make(job);
            row.update(job);
            return [job.id, row];
        });
        if (rows.map(([id]) => id).join() !== [...this.rows.keys()].join()) {
            this.rows = new Map(rows);
            this.body.replaceChildren(...rows.map(([, row]) => row.element));
        }
        this.table.hidden = rows.length === 0;
        this.none.hidden = rows.length > 0;
    }

    make(job) {
        const cell = (name, ...children) => element("td", { role: "cell", "data-label": name }, ...children);
        const what = `${KINDS[job.kind] ?? job.kind} ${job.vm ?? "of this host"}`;
        const [state, now, result] = [element("span"), element("span"), element("span")];
        const bar = element("progress", { "aria-label": `Progress: ${what}` });
        const cancel = element("button", { type: "button", "aria-label": `Cancel: ${what}` }, "Cancel");
        cancel.addEventListener("click", () => this.give({ title: `Cancel ${what}`, route: `v1/jobs/${job.id}/cancel` }));
        const progress = cell("Progress", bar, " ", now, " ", cancel);
        const row = element(
            "tr",
            { role: "row" },
            element("th", { role: "rowheader", scope: "row" }, what),
            cell("State", state),
            progress,
            cell("Began", element("time", { datetime: job.began }, clock(job.began))),
            cell("What came of it", result),
        );
        const update = (job) => {
            setText(state, `${SIGNS[job.state] ?? "?"} ${job.state}`);
            setClass(state, `state ${TONES[job.state] ?? "warn"}`);
            const runs = job.state === "running";
            const { done, total } = job.progress;
            bar.hidden = !runs;
            setClass(progress, runs ? "" : "empty");
            if (total > 0) {
                bar.max = total;
                bar.value = done;
            } else bar.removeAttribute("value");
            setText(now, runs ? [total > 0 ? `${done} of ${total}` : "", job.progress.now].filter(Boolean).join(": ") : "");
            cancel.hidden = !(runs && job.can_cancel);
            setText(result, outcome(job));
        };
        return { element: row, update };
    }
}

export class Events {
    constructor(list, none) {
        this.list = list;
        this.none = none;
    }

    /// The node was heard.
    show() {
        this.none.hidden = this.list.children.length > 0;
    }

    add(event) {
        this.none.hidden = true;
        const vm = event.vm ? element("b", {}, event.vm) : null;
        const bad = /unprotected|failed|not succeeded|has ended/.test(event.text);
        this.list.prepend(
            element(
                "li",
                { class: bad ? "bad" : null },
                element("time", { datetime: event.time }, clock(event.time)),
                " ",
                vm,
                vm ? " " : null,
                element("span", {}, event.text),
            ),
        );
        while (this.list.children.length > MOST_EVENTS) this.list.lastChild.remove();
    }

    /// Some are lost.
    reset() {
        this.none.hidden = true;
        this.list.prepend(element("li", { class: "quiet" }, "The node has begun anew, or events are lost."));
    }
}
