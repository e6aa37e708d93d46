/* Draws a page of the platform from its data, every two seconds while the page is visible.
   All text is set as text, never as HTML.  Elements that exist are changed in place, so that focus, selection and scrolling stay. */
(function () {
    "use strict";

    const EVERY_MS = 2000, HEIGHT = 170, LEFT = 88, RIGHT = 12, TOP = 14, BOTTOM = 28;
    const BADGES = {active: "task-state-started", success: "text-bg-success", warning: "text-bg-warning", danger: "text-bg-danger"};
    const page = document.getElementById("rlm-page");
    const at = (id) => document.getElementById("rlm-" + id);
    const absolute = (path) => window.location.origin + path;  // without name and password, which the address may have
    const clock = (seconds) => new Date(seconds * 1000).toISOString().slice(11, 19) + " UTC";
    let picture = null;

    // --- elements --------------------------------------------------------------------------------

    function make(tag, attributes, ...children) {
        const svg = ["svg", "path", "line", "rect", "text"].includes(tag);
        const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
        Object.entries(attributes).filter(([, value]) => value !== "").forEach(([name, value]) => element.setAttribute(name, value));
        element.append(...children.filter((each) => each));
        return element;
    }

    const isSame = (old, made) => old.nodeName === made.nodeName && (old.dataset || {}).key === (made.dataset || {}).key;

    function update(old, made) {
        if (old.nodeType === Node.TEXT_NODE) {
            if (old.data !== made.data) { old.data = made.data; }
            return;
        }
        [...old.attributes].filter(({name}) => !made.hasAttribute(name)).forEach(({name}) => old.removeAttribute(name));
        [...made.attributes].filter(({name, value}) => old.getAttribute(name) !== value)
            .forEach(({name, value}) => old.setAttribute(name, value));
        fill(old, ...made.childNodes);
    }

    function fill(parent, ...wanted) {
        let next = parent.firstChild;
        wanted.forEach((made) => {
            let old = next;
            while (old && !isSame(old, made)) { old = old.nextSibling; }
            if (!old) { parent.insertBefore(made, next); return; }
            while (next !== old) { next = next.nextSibling; next.previousSibling.remove(); }
            update(old, made);
            next = old.nextSibling;
        });
        while (next) { const gone = next; next = next.nextSibling; gone.remove(); }
    }

    // --- parts of a page -------------------------------------------------------------------------

    function card(about) {
        return make("article", {class: "metric-card" + (about.tone ? " metric-card-" + about.tone : "")},
            make("p", {class: "metric-label"}, about.label), make("p", {class: "metric-value"}, about.value));
    }

    function button(action) {
        return make("button", {type: "button", class: "btn btn-sm btn-outline-secondary", "aria-label": action.label,
            "data-key": action.label || action.title, "data-action": JSON.stringify(action)}, action.title);
    }

    const unbroken = (text) => (text.length < 16 ? " text-nowrap" : text.length > 120 ? " rlm-words" : "");

    function content(value) {
        if (value.link) { return make("a", {href: page.dataset.job.replace("ID", encodeURIComponent(value.link))}, value.text); }
        return value.badge ? make("span", {class: "badge " + (BADGES[value.tone] || "text-bg-secondary")}, value.text) : value.text;
    }

    function bar(share, tone) {
        return make("div", {class: "rlm-bar" + tone}, make("span", {style: "width:" + Math.round(100 * share) + "%"}));
    }

    function cell(value, mayAct, minor) {
        const about = typeof value === "string" ? {text: value, bar: null} : value;
        const tone = about.tone && !about.badge ? " rlm-" + about.tone : "", drawn = about.bar !== null;
        const classes = (minor ? "broker-secondary-column" : "") + unbroken(about.text) + (drawn ? "" : tone);
        return make("td", {class: classes.trim(), style: about.indent ? "padding-left:" + (1 + about.indent) + "rem" : ""},
            content(about), about.note && make("div", {class: "rlm-note" + unbroken(about.note)}, about.note),
            drawn && bar(about.bar, tone), about.action && mayAct && button(about.action));
    }

    function row(values, columns, minor, mayAct) {
        const key = values.map((value) => value.link || (value.action && value.action.label)).find(Boolean) || "";
        return make("tr", {"data-key": key}, ...values.map((value, i) => cell(value, mayAct, minor.includes(columns[i]))));
    }

    function head(column, minor) {
        const name = column || make("span", {class: "visually-hidden"}, "Actions");
        return make("th", {scope: "col", class: minor.includes(column) ? "broker-secondary-column" : ""}, name);
    }

    function table(about, mayAct) {
        const rows = about.rows.map((values) => row(values, about.columns, about.minor, mayAct));
        const empty = make("tr", {}, make("td", {class: "empty-table-message", colspan: about.columns.length}, about.empty));
        return make("div", {"data-key": about.title.split(":")[0]}, about.title && make("h2", {class: "rlm-title"}, about.title),
            make("section", {class: "broker-table-card", "aria-label": about.title.split(":")[0]},
                make("figure", {class: "table-responsive mb-0"},
                    make("table", {class: "broker-table table table-hover align-middle mb-0"},
                        make("thead", {}, make("tr", {}, ...about.columns.map((column) => head(column, about.minor)))),
                        make("tbody", {}, ...(rows.length ? rows : [empty]))))));
    }

    function chart(about) {
        const title = make("h2", {class: "rlm-title"}, about.title);
        if (about.points.length < 2) {
            return make("div", {}, title, make("p", {class: "rlm-hint"}, "The chart needs two measurements of the monitor, which beat starts."));
        }
        const width = at("chart").clientWidth, bottom = HEIGHT - BOTTOM, top = about.levels.length - 1;
        const first = about.points[0][0], last = about.points[about.points.length - 1][0];
        const x = (seconds) => Math.round(LEFT + (width - LEFT - RIGHT) * (seconds - first) / Math.max(1, last - first));
        const y = (level) => Math.round(TOP + (bottom - TOP - 6) * (top - level) / top);
        const path = about.points.map(([when, level], i) => (i ? "H" + x(when) + "V" : "M" + x(when) + " ") + y(level)).join("");
        const drill = about.levels.indexOf(about.drill);
        const now = about.levels[about.points[about.points.length - 1][1]];
        return make("div", {}, title, make("svg",
            {class: "rlm-chart", width: width, height: HEIGHT, role: "img", "aria-label": about.title + ": now " + now},
            ...about.levels.flatMap((name, level) => [
                make("line", {x1: LEFT, x2: width - RIGHT, y1: y(level), y2: y(level)}), make("text", {x: 12, y: y(level) + 4}, name)]),
            ...about.points.slice(1).map(([when], i) => {
                const [since, level] = about.points[i];
                return make("rect", {class: "rlm-level-" + level, x: x(since), y: y(level), width: x(when) - x(since), height: bottom - y(level)});
            }),
            make("path", {d: path}),
            ...(drill < 0 ? [] : [
                make("line", {class: "rlm-drill", x1: LEFT, x2: width - RIGHT, y1: y(drill), y2: y(drill)}),
                make("text", {class: "rlm-drill-word", x: LEFT + 6, y: y(drill) + 15}, "drill: all act on " + about.drill)]),
            make("text", {x: LEFT, y: HEIGHT - 9}, clock(first)),
            make("text", {x: width - RIGHT, y: HEIGHT - 9, "text-anchor": "end"}, clock(last))));
    }

    function draw() {
        const buttons = picture.may_act ? picture.actions.map(button) : [make("p", {class: "rlm-hint"}, picture.hint)];
        ["heading", "about", "sentence"].forEach((name) => fill(at(name), ...(picture[name] ? [document.createTextNode(picture[name])] : [])));
        fill(at("cards"), ...picture.cards.map(card));
        fill(at("actions"), ...buttons);
        fill(at("chart"), ...(picture.chart ? [chart(picture.chart)] : []));
        fill(at("tables"), ...picture.tables.map((each) => table(each, picture.may_act)));
    }

    // --- requests and actions --------------------------------------------------------------------

    async function request(path, options) {
        const answer = await fetch(absolute(path), {credentials: "same-origin", ...options})
            .catch(() => { throw new Error("Flower does not answer"); });
        const content = await answer.json().catch(() => ({error: answer.statusText}));
        if (!answer.ok) { throw new Error(content.error || answer.statusText); }
        return content;
    }

    function showStatus(text, live) {
        at("refresh").textContent = text;
        at("status").setAttribute("aria-live", live ? "off" : "polite");  // screen readers must not read the time every two seconds
        at("dot").className = "status-dot " + (live ? "status-dot-live" : "status-dot-error");
    }

    async function refresh() {
        try {
            picture = await request(window.location.pathname + "?json=1");
            draw();
            showStatus("Updated " + clock(Date.now() / 1000), true);
        } catch (error) {
            showStatus(error.message, false);
        }
    }

    async function poll() {
        if (!document.hidden) { await refresh(); }
        setTimeout(poll, EVERY_MS);
    }

    function toast(text, tone) {
        const made = make("div", {class: "toast border-0 text-bg-" + tone, role: tone === "danger" ? "alert" : "status"},
            make("div", {class: "d-flex"}, make("div", {class: "toast-body"}, text),
                make("button", {type: "button", class: "btn-close btn-close-white me-2 m-auto", "data-bs-dismiss": "toast", "aria-label": "Close"})));
        made.addEventListener("hidden.bs.toast", () => made.remove());
        document.getElementById("toast-container").append(made);
        bootstrap.Toast.getOrCreateInstance(made).show();
    }

    async function act(action) {
        if (action.confirm && !window.confirm(action.confirm)) { return; }
        const xsrf = (document.cookie.match(/\b_xsrf=([^;]*)/) || ["", ""])[1];
        const how = {method: "POST", headers: {"X-XSRFToken": xsrf}, body: new URLSearchParams(action.about)};
        try {
            toast((await request(page.dataset.do.replace("NAME", action.name), how)).done, "success");
        } catch (error) {
            toast(error.message, "danger");
        }
        await refresh();
    }

    page.addEventListener("click", (event) => {
        const pressed = event.target.closest("[data-action]");
        if (pressed) { act(JSON.parse(pressed.dataset.action)); }
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) { refresh(); } });
    window.addEventListener("resize", () => { if (picture) { draw(); } });
    poll();
}());
