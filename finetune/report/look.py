"""How pages look: one set of colours and sizes for the report and for the web page of `finetune ui`."""

STYLE = """
:root{--ink:#1d1d1f;--soft:#6b6b70;--line:#e3e3e6;--page:#fbfbfc;--card:#fff;--mark:#2f6fde;--good:#1a7a41;--bad:#c23b2e}
@media(prefers-color-scheme:dark){:root{--ink:#ececef;--soft:#9a9aa2;--line:#33343a;--page:#17181b;--card:#1f2024;--mark:#7aa7ff;
--good:#5cc689;--bad:#ff8d80}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 80px}h1{font-size:30px;line-height:1.2;margin:0 0 6px}
h2{font-size:18px;margin:44px 0 12px}p{margin:6px 0 12px}.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;overflow-x:auto}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:6px 14px 6px 0;vertical-align:top}
th{font-weight:600;color:var(--soft);white-space:nowrap}tr+tr td,tr+tr th{border-top:1px solid var(--line)}
img{display:inline-block;border-radius:8px;margin:0 6px 6px 0;vertical-align:top}code,pre{font:13px/1.5 ui-monospace,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;overflow-x:auto}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:18px}.pair h3{font-size:13px;color:var(--soft);margin:0 0 6px;font-weight:600}
.prompt{font-weight:600;margin:22px 0 8px}.good{color:var(--good)}.bad{color:var(--bad)}
.row img{width:calc(25% - 8px);max-width:160px;height:auto}svg{max-width:100%;height:auto}a{color:inherit}
.row a{display:inline}
.strip{display:grid;grid-template-columns:repeat(var(--columns),minmax(56px,120px));gap:4px 8px;margin-bottom:8px}.strip figure{margin:0}.strip img{width:100%;height:auto;margin:0}.strip .prompt{grid-column:1/-1;margin:12px 0 2px}
.chart{display:grid;grid-template-columns:40px 1fr;gap:2px 8px;margin:14px 0;font-size:12px;color:var(--soft)}.chart figcaption,.chart .steps{grid-column:2}.chart figcaption{display:flex;flex-wrap:wrap;gap:0 16px}.plot{width:100%;height:150px;overflow:visible;border-left:1px solid var(--line)}.axis,.steps{display:flex;justify-content:space-between}.axis{flex-direction:column;text-align:right}
.measures td:nth-child(2){text-align:right}.measures td:nth-child(-n+3),code.whole{white-space:nowrap}
figcaption{font-size:12px;color:var(--soft)}.small img{width:96px;height:auto}td,li,code,p{overflow-wrap:anywhere}td[title=format],td[title=size]{white-space:nowrap}
@media(max-width:700px){.pair{grid-template-columns:1fr}.row img{width:calc(50% - 8px)}main{padding:20px 10px 60px}.card{padding:12px}tr:has(td+td){border-top:1px solid var(--line)}
tr:has(td+td) td{display:block;padding:2px 0;border:0!important}tr:has(th+th){display:none}td[title]::before{content:attr(title) ": ";color:var(--soft)}
.measures,.measures tbody,.measures tr{display:block}.measures tr td:nth-child(-n+3){display:inline;white-space:normal;padding-right:8px}.measures tr td:nth-child(4){padding-bottom:8px}code.whole{white-space:normal}
.plan th,.plan td{display:block;padding:2px 0}.plan td{border:0!important;padding-bottom:8px}}
"""
