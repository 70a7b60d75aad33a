// The way to the node: all of it is beside this page.

const PATIENCE_MS = 8000;
/// The node says something at least every 15 s on a stream of events.
const SILENCE_MS = 45_000;
const AGAIN_MS = [500, 1000, 2000, 4000];
/// How many of the events before this page are asked for.
const BEFORE = 200;

/// Why something was not done.
export class Refused extends Error {
    constructor(status, said) {
        super(said.message || `the node answers ${status}`);
        this.status = status;
        this.code = said.code || "";
        this.remedy = said.remedy || "";
    }
}

function place(route) {
    return new URL(route, document.baseURI);
}

async function answer(response) {
    const text = await response.text();
    let said = null;
    try {
        said = text === "" ? null : JSON.parse(text);
    } catch {
        said = { message: text.trim() };
    }
    if (!response.ok) throw new Refused(response.status, said || {});
    return said;
}

export async function get(route) {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    return answer(await fetch(place(route), { cache: "no-store", signal }));
}

/// Gives an order. The header is one that a page of another origin cannot send.
export async function order(route, body) {
    const headers = { "x-outlive-page": "1" };
    if (body !== undefined) headers["content-type"] = "application/json";
    const signal = AbortSignal.timeout(4 * PATIENCE_MS);
    const text = body === undefined ? undefined : JSON.stringify(body);
    return answer(await fetch(place(route), { method: "POST", headers, body: text, signal }));
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/// Follows the events for ever, and misses none: it goes on after the last one that it has heard. `heard` gets each, and
/// `reset` says that some are lost, or that another node has begun.
export async function follow(heard, reset) {
    let last = null;
    let failures = 0;
    for (;;) {
        try {
            last ??= await beginning();
            await stream(last, (event) => {
                failures = 0;
                last = event.id;
                if (event.kind === "reset") reset();
                else if (event.kind) heard(event.data);
            });
        } catch {
            // Whoever asks for the VMs says that the node is gone.
        }
        await sleep(AGAIN_MS[Math.min(failures++, AGAIN_MS.length - 1)]);
    }
}

/// The place of some events before now. The node tells the place of the newest one first.
async function beginning() {
    let newest = null;
    await stream(null, (event) => {
        newest = event.id;
        return true;
    });
    const [, life, number] = newest.match(/^(.*)-(\d+)$/);
    return `${life}-${Math.max(0, Number(number) - BEFORE)}`;
}

/// Reads events after `last` until the stream ends, or `tell` has had enough.
async function stream(last, tell) {
    const control = new AbortController();
    let alarm = setTimeout(() => control.abort(), SILENCE_MS);
    try {
        const headers = last === null ? {} : { "last-event-id": last };
        const response = await fetch(place("v1/events"), { cache: "no-store", headers, signal: control.signal });
        if (!response.ok) return void (await answer(response));
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        for (;;) {
            const { value, done } = await reader.read();
            if (done) return;
            clearTimeout(alarm);
            alarm = setTimeout(() => control.abort(), SILENCE_MS);
            const blocks = (rest + value).split("\n\n");
            rest = blocks.pop();
            for (const event of blocks.map(read).filter((it) => it.id)) {
                if (tell(event)) return;
            }
        }
    } finally {
        clearTimeout(alarm);
        control.abort();
    }
}

function read(block) {
    const event = { id: null, kind: null, data: null };
    for (const line of block.split("\n")) {
        if (line.startsWith("id: ")) event.id = line.slice(4);
        else if (line.startsWith("event: ")) event.kind = line.slice(7);
        else if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
    }
    return event;
}
