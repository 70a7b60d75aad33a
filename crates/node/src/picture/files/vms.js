// The table of VMs.

import { Heat } from "./heat.js";
import { Lanes } from "./lanes.js";
import { KINDS, STATES, bytes, clock, count, element, setClass, setText, span } from "./words.js";

/// What can be told to a VM in a state.
const MAY_START = ["stopped", "ended", "failed", "waiting"];
const MAY_STOP = ["running", "starting", "waiting"];
const MAY_LEAVE = ["standby", "deciding"];

export class Vms {
    constructor(table, none, give) {
        this.table = table;
        this.none = none;
        this.give = give;
        this.rows = new Map();
    }

    show(list, figures, node, jobs) {
        const names = new Set(list.map((vm) => vm.name));
        for (const [name, row] of this.rows) {
            if (!names.has(name)) {
                row.end();
                this.rows.delete(name);
            }
        }
        for (const [at, vm] of list.entries()) {
            if (!this.rows.has(vm.name)) {
                const row = new Row(vm.name, this.give);
                this.rows.set(vm.name, row);
                // The node has them by name.
                this.table.insertBefore(row.body, this.table.tBodies[at] ?? null);
            }
            const row = this.rows.get(vm.name);
            row.show(vm, node, jobs.get(vm.name) ?? jobs.get(null));
            if (figures !== null) row.lanes.take(figures.vms[vm.name] ?? [], figures.reset);
            // A node of an older release has none.
            row.heat.show(figures?.heat?.[vm.name]);
            row.lanes.draw();
        }
        this.table.hidden = list.length === 0;
        this.none.hidden = list.length > 0;
    }

    /// What a process that has ended, or has just begun, cannot say.
    mark(event) {
        if (["process_ended", "process_started"].includes(event.kind)) {
            this.rows.get(event.vm)?.lanes.mark(event.time, event.kind);
        }
    }
}

class Row {
    constructor(name, give) {
        this.name = name;
        this.give = give;
        const cell = (label, ...children) => element("td", { role: "cell", "data-label": label }, ...children);
        const span_ = () => element("span");
        this.state = span_();
        this.since = element("span", { class: "quiet" });
        this.guard = span_();
        this.guardWhy = element("span", { class: "quiet" });
        this.loss = span_();
        this.lossWhat = element("span", { class: "quiet" });
        this.behind = span_();
        this.hosts = element("span", { class: "hosts" });
        this.orders = element("div", { class: "orders" });
        this.buttons = new Map();
        this.notes = element("ul", { class: "notes" });
        this.box = element("div", { class: "lanes" });
        this.heat = new Heat(name);
        this.more = element("dl");
        const details = element("details", {}, element("summary", { "aria-label": `More about ${name}` }, "More"), this.more);
        this.body = element(
            "tbody",
            { role: "rowgroup" },
            element(
                "tr",
                { role: "row" },
                element("th", { role: "rowheader", scope: "row" }, name),
                cell("State", this.state, " ", this.since),
                cell("Protected", this.guard, " ", this.guardWhy),
                cell("If this host failed now", this.loss, " ", this.lossWhat),
                cell("Behind", this.behind),
                cell("Who protects whom", this.hosts),
                cell("Orders", this.orders),
            ),
            element("tr", { role: "row", class: "second" }, element("td", { role: "cell", colspan: "7" }, this.notes, this.box, this.heat.box, details)),
        );
        this.lanes = new Lanes(name, this.box);
    }

    end() {
        this.lanes.end();
        this.body.remove();
    }

    show(vm, node, job) {
        const { sign, tone } = STATES[vm.state] ?? { sign: "?", tone: "warn" };
        setText(this.state, `${sign} ${vm.state}`);
        setClass(this.state, `state ${tone}`);
        setText(this.since, `since ${clock(vm.since)}`);
        const status = vm.status;
        const lives = ["running", "standby", "deciding", "starting"].includes(vm.state) && status;
        this.showGuard(vm, lives ? status : null);
        this.showLoss(lives ? status : null);
        setText(this.behind, lives ? behind(status) : "–");
        this.showHosts(vm, lives ? status : null, node.host);
        this.showOrders(vm, node, job);
        this.showNotes(vm, status);
        this.showMore(vm, status);
    }

    showGuard(vm, status) {
        const since = status?.since ? `since ${clock(status.since)}` : "";
        if (status === null) {
            setText(this.guard, "–");
            setClass(this.guard, "");
            setText(this.guardWhy, vm.why ?? vm.definition_error ?? "");
        } else if (vm.protected) {
            setText(this.guard, "✓ protected");
            setClass(this.guard, "state good");
            setText(this.guardWhy, since);
        } else {
            const matters = status.role === "primary";
            setText(this.guard, matters ? "✕ UNPROTECTED" : "○ not protected");
            setClass(this.guard, `state ${matters ? "bad" : "warn"}`);
            setText(this.guardWhy, [since, vm.why].filter(Boolean).join(": "));
        }
    }

    showLoss(status) {
        const loss = status?.loss_of_this_host;
        if (!loss) {
            setText(this.loss, status === null ? "does not run here" : "not known");
            setClass(this.loss, "quiet");
            setText(this.lossWhat, "");
            return;
        }
        setText(this.loss, loss.survived ? "✓ survived" : "✕ NOT SURVIVED");
        setClass(this.loss, `state ${loss.survived ? "good" : "bad"}`);
        const work = loss.lost_ms > 0 ? `; about ${span(loss.lost_ms)} of its work is lost, none of it answered` : "";
        setText(this.lossWhat, `${loss.what ?? ""}${work}`);
    }

    showHosts(vm, status, host) {
        const peer = status?.peer ?? "another host";
        const here = `${host} (here)`;
        let text = vm.has_standby ? "has a second host" : "has no second host";
        if (status?.role === "primary") {
            text = vm.protected ? `${here} runs it ▸ ${peer} protects it` : `${here} runs it, nobody protects it`;
        } else if (status?.role === "standby") {
            text = vm.protected ? `${peer} runs it ▸ ${here} protects it` : `${here} waits for a primary`;
        }
        setText(this.hosts, text);
    }

    showOrders(vm, node, job) {
        const name = vm.name;
        const peer = vm.status?.peer ?? "the other host";
        const route = (what) => `v1/vms/${encodeURIComponent(name)}/${what}`;
        const wanted = [];
        if (vm.state === "running" && vm.has_standby) {
            wanted.push({
                key: "hand_over",
                label: "Hand over",
                off: vm.protected ? "" : "it is not protected, so nobody could take it",
                title: `Hand ${name} over to ${peer}?`,
                text: `${name} moves to its standby: no reboot, no lost connection. This host becomes its standby then.`,
                button: "Hand over",
                route: route("hand-over"),
            });
        }
        if (MAY_START.includes(vm.state)) {
            wanted.push({
                key: "start",
                label: "Start",
                off: node.mode === "active" ? "" : `this host is ${node.mode}`,
                title: `Start ${name}?`,
                text: vm.has_standby
                    ? `${name} runs here, or this host waits as its standby, as its images and the arbiter say.`
                    : `${name} runs here.`,
                button: "Start",
                route: route("start"),
            });
        }
        if (MAY_STOP.includes(vm.state)) {
            wanted.push({
                key: "stop",
                label: "Stop",
                title: `Shut ${name} down?`,
                text: `The guest's power button is pressed. ${name} then stays stopped${vm.has_standby ? ", on both hosts," : ""} until it is started.`,
                button: "Shut down",
                route: route("stop"),
                body: {},
                now: true,
            });
        }
        if (MAY_LEAVE.includes(vm.state)) {
            wanted.push({
                key: "leave",
                label: "End protection",
                title: `End the protection of ${name} here?`,
                text: `${name} goes on at ${peer}, UNPROTECTED, until it is started here again.`,
                button: "End protection",
                route: route("stop"),
                body: { only_standby: true },
            });
        }
        const under_way = job ? `${KINDS[job.kind] ?? job.kind} is under way` : "";
        if (wanted.map((it) => it.key).join() !== [...this.buttons.keys()].join()) this.makeButtons(wanted);
        for (const question of wanted) {
            const { button, why } = this.buttons.get(question.key);
            const off = under_way || question.off || "";
            this.buttons.get(question.key).question = question;
            // It can still be reached, and says why it does nothing.
            button.setAttribute("aria-disabled", off ? "true" : "false");
            setText(why, off ? ` (${off})` : "");
            button.title = off;
        }
    }

    makeButtons(wanted) {
        this.buttons = new Map(
            wanted.map(({ key, label }) => {
                const why = element("span", { class: "unseen" });
                const button = element("button", { type: "button", "data-order": key }, label, element("span", { class: "unseen" }, ` ${this.name}`), why);
                const it = { button, why, question: null };
                button.addEventListener("click", () => {
                    if (button.getAttribute("aria-disabled") !== "true") this.give(it.question);
                });
                return [key, it];
            }),
        );
        this.orders.replaceChildren(...[...this.buttons.values()].map((it) => it.button));
    }

    /// What an operator should know without asking.
    showNotes(vm, status) {
        const notes = [];
        if (vm.definition_error && vm.state !== "misdefined") notes.push(`The definition cannot be used: ${vm.definition_error}`);
        if (vm.definition_changed) notes.push("The definition has changed, which counts from the next start.");
        if (vm.failures > 0) notes.push(`Its process has failed ${vm.failures === 1 ? "once" : `${vm.failures} times in a row`}.`);
        if (status?.link === "plain") notes.push("THE LINK IS INSECURE: neither encrypted nor authenticated.");
        if (status?.arbiter?.lost) notes.push(`THE ARBITER IS LOST: ${status.arbiter.lost}`);
        if (status?.standby_lost_arbiter_since) notes.push(`The standby cannot reach the arbiter since ${clock(status.standby_lost_arbiter_since)}.`);
        if (status?.audit?.differences > 0) notes.push(`THE STANDBY'S COPY HAS DIFFERED ${status.audit.differences} TIMES.`);
        notes.push(...(vm.warnings ?? []));
        if (this.notes.dataset.text === notes.join("\n")) return;
        this.notes.dataset.text = notes.join("\n");
        this.notes.replaceChildren(...notes.map((note) => element("li", {}, note)));
    }

    showMore(vm, status) {
        const ago = (ms) => (ms === null || ms === undefined ? "not yet" : `${span(ms)} ago`);
        const all = [
            ["Desired", vm.desired],
            ["Process", vm.pid === null ? "none, or not known" : `${vm.pid}${vm.adopted ? ", found by this node" : ""}`],
            ["How the last one ended", vm.last_end?.what],
            ["Generation", status?.generation],
            ["Checkpoint", status?.checkpoint],
            ["Link", status?.link],
            ["Confined", status === null ? undefined : status.sandbox ? "yes" : "no"],
            ["Arbiter", status?.arbiter ? (status.arbiter.is_operator ? "an operator" : `answered ${ago(status.arbiter.seen_ms_ago)}`) : undefined],
            ["Audit", status?.audit ? `${count(status.audit.pages)} pages compared, ${status.audit.differences} differences` : undefined],
            ["If the other host failed now", lossText(status?.loss_of_other_host)],
        ].filter(([, value]) => value !== undefined && value !== null && value !== "");
        const text = all.map((it) => it.join(" ")).join("\n");
        if (this.more.dataset.text === text) return;
        this.more.dataset.text = text;
        this.more.replaceChildren(...all.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
    }
}

function lossText(loss) {
    return loss ? `${loss.survived ? "survived" : "NOT SURVIVED"}: ${loss.what}` : undefined;
}

/// How far the standby is behind.
function behind(status) {
    const commit = status.committed_ms_ago;
    if (!status.protected || commit === null || commit === undefined) return "–";
    const flight = status.in_flight > 0 ? `, ${status.in_flight} in flight` : "";
    const size = status.in_flight > 0 && status.bytes_in_flight > 0 ? ` (${bytes(status.bytes_in_flight)})` : "";
    return `commit ${span(commit)} ago${flight}${size}`;
}
