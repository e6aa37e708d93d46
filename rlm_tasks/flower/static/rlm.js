/* Draws a page of the platform from its data, every two seconds, as long as the page is looked at.
   All text is set as text, never as HTML. */
(function () {
    "use strict";

    const EVERY_MS = 2000, WIDTH = 1000, HEIGHT = 140, LEFT = 80, BOTTOM = 20;
    const page = document.getElementById("rlm-page");
    const at = (id) => document.getElementById("rlm-" + id);
    const here = (path) => window.location.origin + path;  // without a name and password that the address may have
    let drawn = "";

    function make(tag, attributes, ...children) {
        const svg = ["svg", "path", "line", "text"].includes(tag);
        const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
        Object.entries(attributes || {}).forEach(([name, value]) => element.setAttribute(name, value));
        element.append(...children.filter((each) => each !== null && each !== undefined));
        return element;
    }

    function card(about) {
        return make("article", {class: "metric-card" + (about.tone ? " metric-card-" + about.tone : "")},
            make("p", {class: "metric-label"}, about.label), make("p", {class: "metric-value"}, about.value));
    }

    function button(action) {
        const made = make("button", {type: "button", class: "btn btn-sm btn-outline-secondary", "data-action": action.name}, action.title);
        made.addEventListener("click", () => act(action));
        return made;
    }

    function cell(value, mayAct) {
        if (typeof value === "string") { return make("td", {}, value); }
        const made = make("td", {class: value.tone ? "rlm-" + value.tone : ""});
        if (value.indent) { made.style.paddingLeft = (1 + 1.25 * value.indent) + "rem"; }
        made.append(value.link ? make("a", {href: page.dataset.job.replace("ID", encodeURIComponent(value.link))}, value.text) : value.text);
        if (value.bar !== null) {
            made.append(make("div", {class: "rlm-bar"}, make("span", {style: "width:" + Math.round(100 * value.bar) + "%"})));
        }
        if (value.action && mayAct) { made.append(button(value.action)); }
        return made;
    }

    function table(about, mayAct) {
        const rows = about.rows.map((row) => make("tr", {}, ...row.map((value) => cell(value, mayAct))));
        const empty = make("tr", {}, make("td", {class: "empty-table-message", colspan: about.columns.length}, about.empty));
        return make("div", {}, about.title ? make("h2", {class: "rlm-title"}, about.title) : null,
            make("section", {class: "broker-table-card"}, make("figure", {class: "table-responsive mb-0"},
                make("table", {class: "broker-table table table-hover align-middle mb-0"},
                    make("thead", {}, make("tr", {}, ...about.columns.map((column) => make("th", {}, column)))),
                    make("tbody", {}, ...(rows.length ? rows : [empty]))))));
    }

    function chart(about) {
        if (about.points.length < 2) { return make("p", {class: "page-description"}, "The level over time is drawn when beat has looked twice."); }
        const first = about.points[0][0], last = about.points[about.points.length - 1][0], top = about.levels.length - 1;
        const x = (seconds) => LEFT + (WIDTH - LEFT - 10) * (seconds - first) / Math.max(1, last - first);
        const y = (level) => 10 + (HEIGHT - BOTTOM - 20) * (top - level) / top;
        const path = about.points.map(([when, level], i) => (i ? "H" + x(when) + "V" : "M" + x(when) + " ") + y(level)).join("");
        const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();
        return make("div", {}, make("h2", {class: "rlm-title"}, about.title),
            make("svg", {class: "rlm-chart", viewBox: "0 0 " + WIDTH + " " + HEIGHT, role: "img", "aria-label": about.title},
                ...about.levels.flatMap((name, level) => [
                    make("line", {x1: LEFT, x2: WIDTH - 10, y1: y(level), y2: y(level)}),
                    make("text", {x: 8, y: y(level) + 4}, name)]),
                make("path", {d: path}),
                make("text", {x: LEFT, y: HEIGHT - 5}, clock(first)),
                make("text", {x: WIDTH - 10, y: HEIGHT - 5, "text-anchor": "end"}, clock(last))));
    }

    function draw(picture) {
        const looks = JSON.stringify(picture);
        if (looks === drawn) { return; }  // what is selected, or about to be clicked, stays
        drawn = looks;
        at("sentence").textContent = picture.sentence;
        at("cards").replaceChildren(...picture.cards.map(card));
        at("actions").replaceChildren(...(picture.may_act ? picture.actions.map(button) : [make("p", {class: "rlm-hint"}, picture.hint)]));
        at("chart").replaceChildren(...(picture.chart ? [chart(picture.chart)] : []));
        at("tables").replaceChildren(...picture.tables.map((each) => table(each, picture.may_act)));
    }

    function tell(words, live) {
        at("refresh").textContent = words;
        at("dot").className = "status-dot " + (live ? "status-dot-live" : "status-dot-error");
    }

    async function refresh() {
        try {
            const answer = await fetch(here(window.location.pathname + "?json=1"), {credentials: "same-origin"});
            const told = await answer.json();
            if (!answer.ok) { throw new Error(told.error || answer.statusText); }
            draw(told);
            tell("Updated " + new Date().toLocaleTimeString(), true);
        } catch (error) {
            tell(error.message, false);
        }
    }

    async function act(action) {
        if (action.confirm && !window.confirm(action.confirm)) { return; }
        const xsrf = (document.cookie.match(/\b_xsrf=([^;]*)/) || ["", ""])[1];
        const answer = await fetch(here(page.dataset.do.replace("NAME", action.name)), {
            method: "POST", credentials: "same-origin", headers: {"X-XSRFToken": xsrf}, body: new URLSearchParams(action.about)
        });
        const told = await answer.json().catch(() => ({error: answer.statusText}));
        await refresh();
        tell(told.done || told.error, answer.ok);
    }

    setInterval(() => { if (!document.hidden) { refresh(); } }, EVERY_MS);
    refresh();
}());
